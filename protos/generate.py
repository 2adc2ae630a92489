"""Generate the protobuf stubs under ``fedsecure/wire/`` from ``protos/fedsecure/v1/*.proto``.

``python protos/generate.py`` writes ``X_pb2.py``, typed ``X_pb2.pyi`` and, for files with a service,
``X_pb2_grpc.py`` (+ ``.pyi``). The package is flat, so the imports that protoc writes are turned into
``from fedsecure.wire import …``. ``python protos/generate.py --check`` writes nothing and fails where a
committed stub differs from its ``.proto``. Needs grpcio-tools and mypy-protobuf, both in the extra ``[dev]``.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
WIRE = PROTOS.parent / "fedsecure" / "wire"
PACKAGE = "fedsecure/v1"
OUTPUTS = ("python_out=", "grpc_python_out=", "mypy_out=quiet:", "mypy_grpc_out=quiet:")


def sources() -> list[str]:
    """Paths of all ``.proto`` files, relative to ``protos/``."""
    return sorted(path.relative_to(PROTOS).as_posix() for path in (PROTOS / PACKAGE).glob("*.proto"))


def run_protoc(*options: str) -> None:
    """Run the protoc of grpcio-tools over all sources; exits with its message on failure."""
    from importlib.resources import files

    from grpc_tools import protoc  # type: ignore[import-untyped]

    plugins = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{PROTOS}",
        f"-I{files('grpc_tools') / '_proto'}",
        *(f"--plugin={plugins / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        *options,
        *sources(),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed: see the message above")


def flatten(text: str) -> str:
    """Turn the imports of a generated file into those of the flat package ``fedsecure.wire``."""
    text = re.sub(r"\bfrom fedsecure\.v1 import\b", "from fedsecure.wire import", text)
    return re.sub(r"\bfedsecure\.v1\.(\w+_pb2(?:_grpc)?)\b", r"fedsecure.wire.\1", text)


def generate(target: Path = WIRE) -> list[Path]:
    """Write all stubs into ``target``; returns the files written."""
    written = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run_protoc(*(f"--{kind}{out}" for kind in OUTPUTS))
        for path in sorted((out / PACKAGE).iterdir()):
            proto = (PROTOS / PACKAGE / re.sub(r"_pb2(_grpc)?\.pyi?$", ".proto", path.name)).read_text()
            if "_grpc" in path.name and not re.search(r"^service\s", proto, re.MULTILINE):
                continue  # an empty gRPC module would make the protocol's floor import grpc
            path.write_text(flatten(path.read_text()))
            written.append(target / path.name)
            shutil.copyfile(path, written[-1])
    return written


def stale() -> list[str]:
    """Names of the sources whose committed stub has another descriptor, or none."""
    from google.protobuf import descriptor_pb2

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        run_protoc(f"--descriptor_set_out={out}")
        fresh = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    found = []
    for file in fresh.file:
        try:
            module = importlib.import_module(f"fedsecure.wire.{Path(file.name).stem}_pb2")
        except ModuleNotFoundError:
            found.append(file.name)
            continue
        committed = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        if _plain(committed) != _plain(file):
            found.append(file.name)
    return found


def _plain(file: object) -> bytes:
    """A file descriptor's bytes without the JSON names, which protoc adds to descriptor sets only."""
    from google.protobuf import descriptor_pb2

    assert isinstance(file, descriptor_pb2.FileDescriptorProto)
    copy = descriptor_pb2.FileDescriptorProto()
    copy.CopyFrom(file)
    pending = list(copy.message_type)
    while pending:
        message = pending.pop()
        pending.extend(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")
    return copy.SerializeToString(deterministic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; fail on a stale stub")
    if parser.parse_args().check:
        names = stale()
        if names:
            raise SystemExit(f"stale stubs: {', '.join(names)}. Cure: python protos/generate.py")
        print("stubs match their sources")
        return
    for path in generate():
        print(path.relative_to(PROTOS.parent))


if __name__ == "__main__":
    main()
