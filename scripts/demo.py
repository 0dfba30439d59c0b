"""Copy a real tree and a large file through a server started for it, encrypted, and compare what arrived.

Everything lies in a temporary directory ($TMPDIR chooses where) and is removed at the end. Needs amst and a
transport installed in the Python that runs this, and `diff`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

GIB = 1 << 30
LARGE = GIB
BLOCK = 4 << 20
SPARE = 256 << 20
START_TIMEOUT_S = 30.0

AMST = [sys.executable, "-m", "amst_core"]


def main() -> int:
    """Run the demonstration; 0 only if all of it arrived identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", help="tree to copy (default: Python's standard library)")
    source = parser.parse_args().source
    if source is not None and not source.is_dir():
        parser.error(f"{source} is not a directory")
    with tempfile.TemporaryDirectory(prefix="amst-demo-") as name:
        work = Path(name)
        try:
            demonstrate(work, source)
        except Failed as err:
            print(f"FAILED: {err}", file=sys.stderr)
            return 1
    print("all of it arrived identical")
    return 0


class Failed(Exception):
    """Something did not work or did not arrive."""


def demonstrate(work: Path, source: Path | None) -> None:
    """Up, compare, down, compare."""
    origin = source if source is not None else Path(sysconfig.get_path("stdlib"))
    tree, large, root = work / "tree", work / "large.bin", work / "root"
    omit = ("site-packages", "__pycache__") if source is None else ()
    need = 3 * size_of(origin, omit) + 2 * LARGE + SPARE
    free = shutil.disk_usage(work).free
    if free < need:
        raise Failed(f"{work} has {show(free)} free and {show(need)} are needed; set TMPDIR to a larger place")
    print(f"machine: {platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}", flush=True)
    try:
        shutil.copytree(origin, tree, symlinks=True, ignore=shutil.ignore_patterns(*omit))
    except OSError as err:  # shutil.Error too
        raise Failed(f"{origin} cannot be copied to {tree}: {err}") from err
    entries = sum(len(names) + len(files) for _, names, files in os.walk(tree))
    print(f"tree:    {origin}: {entries} entries, {show(size_of(tree))}")
    make_large(large)
    print(f"file:    {show(LARGE)} that does not compress", flush=True)
    root.mkdir()
    with server(work, root) as url:
        print(f"server:  {url}, a process of its own", flush=True)
        copy("up:     ", work, tree, large, f"{url}/")
        compare(tree, root / "tree")
        compare(large, root / "large.bin")
        copy("down:   ", work, f"{url}/tree", work / "back")
        compare(tree, work / "back")


def make_large(path: Path) -> None:
    """Fast to make and without repetition: one random block, XORed with another number each time."""
    block = int.from_bytes(os.urandom(BLOCK), "little")
    with open(path, "wb") as file:
        for number in range(LARGE // BLOCK):
            # The pattern is as long as the block, so every part of it changes.
            pattern = int.from_bytes(number.to_bytes(8, "little") * (BLOCK // 8), "little")
            file.write((block ^ pattern).to_bytes(BLOCK, "little"))


@contextlib.contextmanager
def server(work: Path, root: Path) -> Iterator[str]:
    """An `amst serve` of ``root`` on a free port, ended afterwards; its URL."""
    process = subprocess.Popen(
        [*AMST, "serve", "--listen", "127.0.0.1:0", "--root", str(root)],
        stdout=subprocess.PIPE, text=True, env=environment(work),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # it ends with an empty line if the server dies
        words = line.split()
        if words[:2] != ["listening", "on"]:
            raise Failed(f"the server did not start (exit {process.wait(START_TIMEOUT_S)}): {line!r}")
        yield f"amst://{words[2]}"
        process.terminate()
        code = process.wait(60)
        if code:
            raise Failed(f"the server ended with exit code {code}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def copy(label: str, work: Path, *locations: object) -> None:
    """One `amst cp`, and a line about what it did."""
    command = [*AMST, "cp", "--json", *map(str, locations)]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(work), check=False)
    wall = time.monotonic() - began
    if done.returncode:
        raise Failed(f"amst cp ended with exit code {done.returncode}")
    result = json.loads(done.stdout)
    if not (result["ok"] and result["encrypted"] and result["verified"]):
        raise Failed(f"amst cp reports {result}")
    print(
        f"{label} {result['files']} files, {show(result['bytes'])} in {result['seconds']:.2f} s "
        f"({show(result['throughput_bytes_per_s'])}/s; {wall:.2f} s with starting up) "
        f"over {result['streams']} {result['transport']} streams, encrypted, verified",
        flush=True,
    )


def compare(one: Path, other: Path) -> None:
    """Content byte by byte, links as links; then modes and modification times."""
    done = subprocess.run(
        ["diff", "--recursive", "--no-dereference", "--brief", str(one), str(other)],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode or done.stdout:
        raise Failed(f"diff -r says:\n{done.stdout}")
    for path in (one, *one.rglob("*")):
        was, now = path.lstat(), (other / path.relative_to(one)).lstat()
        if not path.is_symlink() and (was.st_mode, was.st_mtime_ns) != (now.st_mode, now.st_mtime_ns):
            raise Failed(f"{path} has another mode or modification time than its copy")
    print(f"diff -r: {one.name} and {other.relative_to(one.parent)}: identical, modes and times too", flush=True)


def environment(work: Path) -> dict[str, str]:
    """A state directory of its own; nothing of the user's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AMST_")}
    return {**kept, "AMST_STATE_DIR": str(work / "state")}


def size_of(tree: Path, omit: Sequence[str] = ()) -> int:
    """Bytes of the files in ``tree``, without directories named as in ``omit``."""
    total = 0
    for folder, names, files in os.walk(tree):
        names[:] = [name for name in names if name not in omit]
        total += sum(os.lstat(os.path.join(folder, file)).st_size for file in files)
    return total


def show(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
