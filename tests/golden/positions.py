"""Three-axis position ids: text runs, image grids and video grids, with the largest position plus one rule."""

import numpy as np

TEMPORAL_PATCH = 2


def seconds_per_grid(fps: float) -> float:
    return TEMPORAL_PATCH / fps


def group_times(groups: int, spg: float, tokens_per_second: int) -> list[int]:
    step = np.float32(spg * tokens_per_second)
    return [int(np.floor(np.float32(i) * step)) for i in range(groups)]


def positions(spans: list[dict], tokens_per_second: int, merge: int = 2) -> tuple[np.ndarray, int]:
    """spans: {"text": n} | {"image": [1,h,w]} | {"video": [t,h,w], "spg": s}, grids in patches.

    Returns int32 [3, T] and the delta that decoding adds to the sequence index.
    """
    columns: list[tuple[int, int, int]] = []
    start = 0
    for span in spans:
        if "text" in span:
            columns += [(start + i,) * 3 for i in range(span["text"])]
            start += span["text"]
            continue
        if "image" in span:
            groups, height, width = span["image"]
            assert groups == 1
            times = [0]
        else:
            groups, height, width = span["video"]
            times = group_times(groups, span["spg"], tokens_per_second)
        rows, cols = height // merge, width // merge
        columns += [(start + t, start + y, start + x) for t in times for y in range(rows) for x in range(cols)]
        start += max(times[-1] + 1, rows, cols)
    ids = np.array(columns, dtype=np.int32).reshape(-1, 3).T.copy()
    return ids, start - ids.shape[1]


def spans_of(ids: list[int], image_id: int, video_id: int, items: list[dict], merge: int = 2) -> list[dict]:
    """Cuts expanded token ids into the spans that `positions` takes; items in order of appearance."""
    spans, at, queue = [], 0, list(items)
    while at < len(ids):
        if ids[at] in (image_id, video_id):
            item = queue.pop(0)
            t, h, w = item["grid_thw"]
            count = t * h * w // merge**2
            assert ids[at:at + count] == [ids[at]] * count
            if ids[at] == image_id:
                assert item["kind"] == "image"
                spans.append({"image": item["grid_thw"]})
            else:
                assert item["kind"] == "video"
                spans.append({"video": item["grid_thw"], "spg": item["spg"]})
            at += count
        else:
            end = at
            while end < len(ids) and ids[end] not in (image_id, video_id):
                end += 1
            spans.append({"text": end - at})
            at = end
    assert not queue
    return spans
