//! Compiles the CUDA kernels, if the feature `cuda` is on: every `cuda/*.cu` to one image that holds machine code for
//! sm_90a and PTX for compute capability 8.0. A file whose inputs have not changed is not compiled again.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

/// Machine code for Hopper, and what the driver translates for everything else from Ampere on.
const TARGETS: &[&str] =
    &["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"];
const FLAGS: &[&str] = &["-fatbin", "-O3", "-std=c++17", "-Xptxas=-v"];
/// Sources whose sums must round as the host's do: products and sums are not fused.
const UNFUSED: &str = "sampler";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match compile_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            println!("cargo::error={reason}");
            ExitCode::FAILURE
        }
    }
}

fn compile_all() -> Result<(), String> {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no manifest directory")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no output directory")?);
    let nvcc = nvcc(&package)?;
    let folder = package.join("cuda");
    println!("cargo::rerun-if-changed={}", folder.display());

    let sources = files(&folder, "cu")?;
    let headers = files(&folder, "cuh")?;
    let header_texts: Vec<String> =
        headers.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || -> Result<(), String> {
        loop {
            let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(source) = sources.get(at) else { return Ok(()) };
            compile(&nvcc, source, &header_texts, &out)?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| "a compiler thread panicked")?)
    })?;

    let mut described = String::from("const FILES: &[KernelFile] = &[\n");
    let mut images = String::from("const IMAGES: &[&[u8]] = &[\n");
    for source in &sources {
        let name = stem(source);
        let report = read(&out.join(format!("{name}.report")))?;
        let image = out.join(format!("{name}.fatbin"));
        let bytes =
            fs::metadata(&image).map_err(|error| format!("{}: {error}", image.display()))?.len();
        describe(&mut described, &name, bytes, &report).map_err(|error| error.to_string())?;
        writeln!(images, "    &Aligned(*include_bytes!({image:?})).0,")
            .map_err(|error| error.to_string())?;
    }
    write(&out.join("cuda_modules.rs"), &format!("{described}];\n{images}];\n"))
}

/// The compiler: of `$CUDA_HOME`, or of the toolkit that `deploy/cuda-toolkit.sh` sets up.
fn nvcc(package: &Path) -> Result<PathBuf, String> {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let home = match env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home),
        None => package.join("../../target/cuda-toolkit"),
    };
    let nvcc = home.join("bin/nvcc");
    println!("cargo::rerun-if-changed={}", nvcc.display());
    match nvcc.is_file() {
        true => Ok(nvcc),
        false => {
            Err("feature `cuda` needs nvcc: run `make cuda`, which sets it up, or set CUDA_HOME"
                .to_owned())
        }
    }
}

/// Compiles one source to `NAME.fatbin`, with the assembler's words in `NAME.report`.
fn compile(nvcc: &Path, source: &Path, headers: &[String], out: &Path) -> Result<(), String> {
    let name = stem(source);
    let (image, report, stamp) = (
        out.join(format!("{name}.fatbin")),
        out.join(format!("{name}.report")),
        out.join(format!("{name}.stamp")),
    );
    let fused = if name.starts_with(UNFUSED) { "--fmad=false" } else { "--fmad=true" };
    let mut hasher = DefaultHasher::new();
    (nvcc, read(source)?, headers, TARGETS, FLAGS, fused).hash(&mut hasher);
    let inputs = format!("{:016x}", hasher.finish());
    if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == inputs) && image.is_file() {
        return Ok(());
    }
    let mut command = Command::new(nvcc);
    command.args(FLAGS).args(TARGETS).arg(fused).arg("-o").arg(&image).arg(source);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let words = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        words.lines().for_each(|line| println!("cargo::warning={line}"));
        return Err(format!("nvcc could not compile {name}.cu"));
    }
    write(&report, &words)?;
    write(&stamp, &inputs)
}

/// Writes one entry of the table of files.
fn describe(
    generated: &mut String,
    name: &str,
    image_bytes: u64,
    report: &str,
) -> std::fmt::Result {
    writeln!(generated, "    KernelFile {{\n        name: {name:?},\n        kernels: &[")?;
    let mut kernels = kernels(report);
    kernels.sort_by_key(|kernel| kernel.name);
    for kernel in kernels {
        let Kernel { name, registers, stack, stores, loads, shared } = kernel;
        writeln!(
            generated,
            "            KernelResources {{ name: {name:?}, registers: {registers}, \
             spill_store_bytes: {stores}, spill_load_bytes: {loads}, stack_bytes: {stack}, \
             shared_bytes: {shared} }},"
        )?;
    }
    writeln!(generated, "        ],\n        image_bytes: {image_bytes},\n    }},")
}

#[derive(Default)]
struct Kernel<'a> {
    name: &'a str,
    registers: u32,
    stack: u32,
    stores: u32,
    loads: u32,
    shared: u32,
}

/// Reads `ptxas -v`: per kernel a line that names it, one with its stack and spills, one with what it uses.
fn kernels(report: &str) -> Vec<Kernel<'_>> {
    let mut kernels: Vec<Kernel<'_>> = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default();
            kernels.push(Kernel { name, ..Kernel::default() });
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        let number_before = |what: &str| -> Option<u32> {
            line.split_once(what)?.0.rsplit([' ', ',']).find(|word| !word.is_empty())?.parse().ok()
        };
        if line.contains("bytes spill stores") {
            kernel.stack = number_before(" bytes stack frame").unwrap_or(0);
            kernel.stores = number_before(" bytes spill stores").unwrap_or(0);
            kernel.loads = number_before(" bytes spill loads").unwrap_or(0);
        }
        if line.contains(": Used ") {
            kernel.registers = number_before(" registers").unwrap_or(0);
            kernel.shared = number_before(" bytes smem").unwrap_or(0);
        }
    }
    kernels
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return Err(format!("{}: {error}", folder.display())),
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    Ok(files)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
