#!/usr/bin/env python3
"""Measures Tessera beside another engine, and makes the table.

    compare.py pair PART PEER ROUND RESULTS.jsonl   one adjacent pair, appended to the results
    compare.py table RESULTS.jsonl                  medians and ratios, as markdown

PART is decode, prefill or vision; PEER is llama.cpp or transformers. In even rounds Tessera runs first, in odd
rounds the peer. Each engine is a process of its own, so that two models are never in memory at once. The paths of
what is run come from flags (see `--help`), which run.sh fills in.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT, PREFILL, IMAGE_SIDE = 256, 512, 1008
ROWS = [
    ("decode 1", "decode, batch 1"),
    ("decode 4", "decode, batch 4"),
    ("decode 8", "decode, batch 8"),
    ("decode 16", "decode, batch 16"),
    ("prefill", f"prefill of {PREFILL} tokens"),
    ("vision", f"vision tower, {IMAGE_SIDE} x {IMAGE_SIDE}"),
]
# What Tessera is meant to reach: the peer's time divided by ours.
TARGETS = {
    "llama.cpp": {"decode 1": 1.1, "prefill": 1.1, "decode 4": 1.5, "decode 8": 1.5, "decode 16": 1.5, "vision": 1.5},
    "transformers": {row: 2.0 for row, _ in ROWS},
}

Samples = dict[str, list[float]]


def output(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return done.stdout


def tessera(part: str, paths: argparse.Namespace) -> Samples:
    """Milliseconds, and under `share …` what part of the machine's own limit, measured beside, that is."""
    flags = {
        "decode": ["--decode", paths.batches, "--context", str(CONTEXT), "--steps", str(paths.steps)],
        "prefill": ["--prefill", str(PREFILL)],
        "vision": ["--vision", f"{IMAGE_SIDE}x{IMAGE_SIDE}"],
    }[part]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [paths.tessera, "bench", "engine", "--shape", "3b", "--device", "cpu"]
        command += ["--threads", str(paths.threads), "--repeats", str(paths.repeats), "--json", file.name]
        output(command + flags)
        report = json.loads(Path(file.name).read_text())
    samples: Samples = {}
    for row in report[part]:
        name = f"decode {row['batch']}" if part == "decode" else part
        samples |= {name: [row["ms"]["median"]], f"share {name}": [row["share"]["median"]]}
    return samples


def llama(part: str, paths: argparse.Namespace) -> Samples:
    threads, models = str(paths.threads), Path(paths.models)
    decoder, vision = str(models / "decoder.gguf"), str(models / "vision.gguf")
    tools = Path(paths.llama)
    if part == "vision":
        command = [str(tools / "llama_vision"), decoder, vision, str(IMAGE_SIDE), threads]
        return {"vision": json.loads(output(command + ["1", "on"]))["encode_ms"]}
    command = [str(tools / "llama-batched-bench"), "-m", decoder, "-t", threads, "-tb", threads]
    command += ["-fa", paths.flash_attention, "-b", "2048", "-ub", "512", "--output-format", "jsonl"]
    if part == "prefill":
        command += ["-c", "1024", "-npp", ",".join([str(PREFILL)] * paths.repeats), "-ntg", "1", "-npl", "1"]
    else:
        most = max(int(batch) for batch in paths.batches.split(","))
        cells = most * (CONTEXT + paths.steps)
        command += ["-c", str(cells), "-npp", str(CONTEXT), "-ntg", str(paths.steps), "-pps"]
        command += ["-npl", ",".join([paths.batches] * paths.repeats)]
    samples: Samples = {}
    for line in output(command).splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        name, seconds = ("prefill", row["t_pp"]) if part == "prefill" else (f"decode {row['pl']}", row["t_tg"] / row["tg"])
        samples.setdefault(name, []).append(seconds * 1e3)
    return samples


def transformers(part: str, paths: argparse.Namespace) -> Samples:
    script = Path(__file__).with_name("transformers_bench.py")
    command = [paths.python, str(script), part, "--threads", str(paths.threads), "--batches", paths.batches]
    report = json.loads(output(command + ["--steps", str(paths.steps), "--repeats", "1"]).splitlines()[-1])
    if part == "decode":
        return {f"decode {batch}": samples for batch, samples in report["decode_ms"].items()}
    (samples,) = report[f"{part}_ms"].values()
    return {part: samples}


def pair(options: argparse.Namespace) -> None:
    peer = {"llama.cpp": llama, "transformers": transformers}[options.peer]
    engines = [("tessera", tessera), (options.peer, peer)]
    if options.round % 2 == 1:
        engines.reverse()
    medians = {}
    for name, measure in engines:
        samples = measure(options.part, options)
        medians[name] = {row: statistics.median(values) for row, values in samples.items()}
        print(name, {row: round(value, 2) for row, value in medians[name].items()}, flush=True)
    record = {"peer": options.peer, "part": options.part, "round": options.round}
    record |= {"tessera_ms": medians["tessera"], "peer_ms": medians[options.peer]}
    with open(options.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def table(options: argparse.Namespace) -> None:
    records = [json.loads(line) for line in Path(options.results).read_text().splitlines()]
    print("| | Tessera ms | peer | peer ms | pairs | ratio | lowest to highest | target | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for peer, targets in TARGETS.items():
        for row, title in ROWS:
            pairs = [
                (record["tessera_ms"][row], record["peer_ms"][row])
                for record in records
                if record["peer"] == peer and row in record["tessera_ms"] and row in record["peer_ms"]
            ]
            if not pairs:
                continue
            ours, theirs = (statistics.median(side) for side in zip(*pairs))
            ratios = sorted(other / own for own, other in pairs)
            ratio = statistics.median(ratios)
            verdict = "reached" if ratio >= targets[row] else "missed"
            print(
                f"| {title} | {ours:.0f} | {peer} | {theirs:.0f} | {len(pairs)} | **{ratio:.2f}** "
                f"| {ratios[0]:.2f} to {ratios[-1]:.2f} | {targets[row]} | {verdict} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Tessera beside llama.cpp and transformers")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("pair")
    one.add_argument("part", choices=["decode", "prefill", "vision"])
    one.add_argument("peer", choices=list(TARGETS))
    one.add_argument("round", type=int)
    one.add_argument("results")
    one.add_argument("--tessera", required=True, help="the binary")
    one.add_argument("--llama", required=True, help="directory of llama-batched-bench and llama_vision")
    one.add_argument("--models", required=True, help="directory of the GGUF files")
    one.add_argument("--python", required=True, help="interpreter that has torch and transformers")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--batches", default="1,4,8,16")
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--flash-attention", default="on", choices=["on", "off"])
    one.set_defaults(run=pair)
    both = commands.add_parser("table")
    both.add_argument("results")
    both.set_defaults(run=table)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
