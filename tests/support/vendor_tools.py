"""Vendors' compilers as recorded: programs for PATH that take exactly the documented command line and print what the real ones print.

Recorded from Coral's ``edgetpu_compiler`` 16 (usage and operation log in its documentation), CANN's ATC and AMCT user guides (options,
error codes E19010 and EZ3003) and RKNN-Toolkit 1.7's user guide (module ``rknn.api``). Any other argument ends them with status 64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_HEAD = f"""#!{sys.executable}
import json, os, re, sys
from pathlib import Path
said, arguments = os.path.dirname(os.path.realpath(__file__)), sys.argv[1:]
with open(os.path.join(said, os.path.basename(__file__) + ".calls"), "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
def stop(why):
    print(why)
    sys.exit(64)
"""

_EDGETPU = """
if arguments == ["--version"]:
    print("Edge TPU Compiler version VERSION\\nSearched for a compatible runtime: 14")
    sys.exit(0)
if arguments != ["-s", "-m", "13", "-t", "600", "-o", ".", "model.tflite"]:
    stop(f"Error: unknown command line {arguments}")
content = Path("model.tflite").read_bytes()
if content[4:8] != b"TFL3":
    stop("Invalid model: model.tflite\\nModel could not be parsed.")
BEHAVIOUR
Path("model_edgetpu.tflite").write_bytes(content + b"mapped")
print("Edge TPU Compiler version 16.0.384591198\\nStarted a compilation timeout timer of 600 seconds.\\n\\nModel compiled successfully in 84 ms.\\n")
print("Number of Edge TPU subgraphs: 1\\nTotal number of operations: 9\\nOperation log: model_edgetpu.log\\n")
print("Number of operations that will run on Edge TPU: 7\\nNumber of operations that will run on CPU: 2\\n")
print("Operator                       Count      Status\\n")
print("CONV_2D                        4          Mapped to Edge TPU")
print("QUANTIZE                       2          Operation is otherwise supported, but not mapped due to some unspecified limitation")
"""

_ATC = """
known = {"model", "framework", "output", "soc_version", "input_format", "input_shape", "precision_mode"}
given = dict(re.fullmatch(r"--(\\w+)=(.*)", a).groups() if re.fullmatch(r"--(\\w+)=(.*)", a) else stop(f"E10001: bad argument {a}") for a in arguments)
if set(given) != known or given["framework"] != "5" or given["input_format"] not in ("NCHW", "ND"):
    stop(f"ATC start working now, please wait for a moment.\\nE10007: [PID: 12] options are {sorted(given)}")
if not re.fullmatch(r"Ascend\\d+\\w*", given["soc_version"]):
    stop(f"E10001: Value [{given['soc_version']}] for parameter [--soc_version] is invalid.")
if "ASCEND_OPP_PATH" not in os.environ or "tbe" not in os.environ.get("PYTHONPATH", ""):
    stop("E10000: ASCEND_OPP_PATH and PYTHONPATH are not set: source set_env.sh")
if not re.fullmatch(r"(\\w+:\\d+(,\\d+)*)(;\\w+:\\d+(,\\d+)*)*", given["input_shape"]) or not os.path.isfile(given["model"]):
    stop("E10002: shape or model")
BEHAVIOUR
Path(given["output"] + ".om").write_bytes(b"IMOD" + given["precision_mode"].encode())
print("ATC start working now, please wait for a moment.\\nATC run success, welcome to the next use.")
"""

_AMCT = """
if arguments[:1] != ["calibration"]:
    stop("amct_onnx: error: invalid choice")
given = dict(re.fullmatch(r"--(\\w+)=(.*)", a).groups() for a in arguments[1:])
if set(given) != {"model", "save_path", "input_shape", "data_dir", "data_types"}:
    stop(f"amct_onnx calibration: error: unrecognized arguments {sorted(given)}")
for folder, kind in zip(given["data_dir"].split(";"), given["data_types"].split(";"), strict=True):
    files = sorted(Path(folder).glob("*.bin"))
    if kind != "float32" or not files or any(f.stat().st_size % 4 for f in files):
        stop("error: calibration data")
if "ASCEND_OPP_PATH" not in os.environ:
    stop("error: source set_env.sh")
BEHAVIOUR
Path(given["save_path"] + "_deploy_model.onnx").write_bytes(Path(given["model"]).read_bytes())
Path(given["save_path"] + "_fake_quant_model.onnx").write_bytes(Path(given["model"]).read_bytes())
"""

_RKNN1 = """
if arguments[:1] == ["-c"]:
    print("rknn-toolkit VERSION")
    sys.exit(0)
import types, runpy
class RKNN:
    def __init__(self, verbose=True, verbose_file=None):
        self.ready = []
    def config(self, target_platform=None, quantized_dtype="asymmetric_quantized-u8", optimization_level=3):
        self.ready.append("config")
        self.chip = target_platform
        return 0 if target_platform in (["rk1808"], ["rk3399pro"]) and quantized_dtype == "asymmetric_quantized-u8" else -1
    def load_onnx(self, model):
        import onnx
        self.ready.append("load")
        return 0 if onnx.load(model).opset_import[0].version <= 12 else -1
    def build(self, do_quantization=True, dataset="./dataset.txt", pre_compile=False):
        self.ready.append("build")
        BEHAVIOUR
        if do_quantization:
            import numpy
            rows = Path(dataset).read_text().split()
            assert rows and all(numpy.load(r).dtype == numpy.float32 for r in rows)
        return 0
    def export_rknn(self, path):
        assert self.ready == ["config", "load", "build"]
        Path(path).write_bytes(b"RKNN1" + self.chip[0].encode())
        return 0
    def release(self):
        pass
api = types.ModuleType("rknn.api")
api.RKNN = RKNN
sys.modules["rknn"], sys.modules["rknn.api"] = types.ModuleType("rknn"), api
sys.argv = arguments
runpy.run_path(arguments[0], run_name="__main__")
"""

_PROGRAMS = {
    "edgetpu_compiler": (_EDGETPU, "16.0.384591198"),
    "atc": (_ATC, ""),
    "amct_onnx": (_AMCT, ""),
    "rknn-toolkit1-python": (_RKNN1, "1.7.5"),
}


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, behaviour: str = "pass", version: str | None = None
) -> Path:
    """Put recorded programs first on PATH.

    Args:
        behaviour: Python that they run before they write their result: to fail as the real one does.
        version: what they say of themselves, instead of what was recorded.
    """
    programs = folder / "compiler" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name in names:
        text, own = _PROGRAMS[name]
        program = programs / name
        indent = "        " if name == "rknn-toolkit1-python" else ""
        program.write_text(
            _HEAD + text.replace("BEHAVIOUR", behaviour.replace("\n", "\n" + indent)).replace("VERSION", version or own)
        )
        program.chmod(0o755)
    (folder / "compiler" / "version.info").write_text(f"Version={version or '7.0.0.5.242'}\nversion_dir=CANN-7.0.0\n")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    if {"atc", "amct_onnx"} & set(
        names
    ):  # as CANN's set_env.sh, whose Python packages a toolchain's own Python must not import
        python = folder / "python" / "tbe"
        python.mkdir(parents=True, exist_ok=True)
        (python / "numpy.py").write_text("raise ImportError('this is CANN's, for another Python')")
        monkeypatch.setenv("ASCEND_OPP_PATH", str(folder / "opp"))
        monkeypatch.setenv("PYTHONPATH", str(python))
    return programs


def calls(programs: Path, name: str) -> list[str]:
    """The command lines that a program got, each as JSON."""
    file = programs / f"{name}.calls"
    return file.read_text().splitlines() if file.exists() else []
