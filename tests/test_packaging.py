# SPDX-License-Identifier: Apache-2.0
"""What is published, and how it is built."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from fresh import ROOT

import combiner
from combiner import _core

JUNK = ("benchmarks/results/time.png", "combiner/_core.abi3.so", "tests/__pycache__/cases.cpython-311.pyc")


def tracked() -> list[str]:
    """The files of the checkout that git keeps and that are there."""
    command = ["git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with what git keeps")
def test_the_source_distribution_is_what_git_keeps(tmp_path):
    """All tests, their data, documents and examples, so that packagers can run them; nothing that was built."""
    kept = tracked()
    copy, made = tmp_path / "copy", tmp_path / "made"
    for name in (*kept, *JUNK):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if name in kept:
            shutil.copy(ROOT / name, copy / name)
        else:
            (copy / name).touch()
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", made, copy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = made.iterdir()
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    own = {name for name in names if name.startswith("combiner_attention.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert (set(kept) - names, names - set(kept) - own) == (set(), set())


def test_the_package_index_shows_the_readme(tmp_path):
    """Its pictures and links lead to the repository's files of this version; nothing else changes."""
    repository = "https://example.org/owner/name"
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "COMBINER_REPOSITORY": repository}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    head, shown = (tmp_path / "combiner_attention.egg-info" / "PKG-INFO").read_text().split("\n\n", 1)
    version = f"v{combiner.info()['version']}"
    assert f"Project-URL: Source, {repository}\n" in head and "Description-Content-Type: text/markdown" in head
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", shown)
    assert all(target.startswith("https://") for _, target in links)
    for picture, target in links:
        folder, _, name = target.removeprefix(repository).partition(f"/{version}/")
        assert not target.startswith(repository) or folder == ("/raw" if picture else "/blob"), target
        assert not target.startswith(repository) or (ROOT / name).exists(), target
    shown = re.sub(rf"{repository}/(raw|blob)/{version}/", "", shown)
    assert shown.strip() == (ROOT / "README.md").read_text().strip()


def test_the_citation_has_the_version():
    assert f"\nversion: {combiner.info()['version']}\n" in (ROOT / "CITATION.cff").read_text()


COMPILER = """#!/bin/sh
for argument; do [ "$before" = -o ] && touch "$argument"; before=$argument; done
began=$(date +%s.%N)
sleep 0.1
echo "$began $(date +%s.%N) $*" > {log}/$$
"""


def test_files_are_compiled_side_by_side_without_debug_information(tmp_path):
    """By a compiler that tells when it ran, and how it was called; CFLAGS=-g brings the debug information back."""
    compiler = tmp_path / "compiler"
    for flags, is_small in (("", True), ("-g", False)):
        log, build = tmp_path / f"log{flags}", tmp_path / f"build{flags}"
        log.mkdir()
        compiler.write_text(COMPILER.format(log=log))
        compiler.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "-j2", f"--build-lib={build}", f"--build-temp={build}"],
            cwd=ROOT,
            env={**os.environ, "CC": str(compiler), "CFLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        calls = sorted(path.read_text().split(maxsplit=2) for path in log.iterdir())
        assert any(float(a[1]) > float(b[0]) for a, b in itertools.pairwise(calls)), "one after the other"
        compiled = [arguments for *_, arguments in calls if ".c " in arguments]
        assert len(compiled) == len([*ROOT.glob("csrc/*/*.c"), *ROOT.glob("combiner/binding/*.c")])
        assert all(("-g0" in arguments) == is_small for arguments in compiled)
        assert f"compiling {len(compiled)} C files, 2 at a time" in done.stdout


def test_a_module_that_is_compiled_already_is_taken_as_it_is(tmp_path):
    """The wheel for Windows has the module that `make windows-wheel` compiles on Linux."""
    module = tmp_path / "_core.pyd"
    module.write_bytes(b"for another system")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "COMBINER_MODULE": str(module)},
        capture_output=True,
        check=True,
    )
    assert [path.name for path in (tmp_path / "combiner").iterdir()] == ["_core.pyd"]
    assert (tmp_path / "combiner" / "_core.pyd").read_bytes() == module.read_bytes()


@pytest.mark.skipif(not shutil.which("readelf"), reason="reads an ELF file with binutils")
def test_the_extension_links_no_library_but_the_systems():
    """No OpenMP, no BLAS: libc, libm, pthreads and the loader."""
    assert _core.__file__
    said = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    linked = re.findall(r"NEEDED.*\[([a-z]+)", said)
    assert linked and set(linked) <= {"libc", "libm", "libpthread", "ld"}
