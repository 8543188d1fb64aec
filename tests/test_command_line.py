# SPDX-License-Identifier: Apache-2.0
"""The command line: every command, as text and as JSON; what is refused, and with which exit code."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from fresh import ROOT, run_python

import combiner
from combiner.cli import EXAMPLES, bench, main
from combiner.cli.bench import Timings


def said(capsys, *arguments) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_info(capsys):
    facts = json.loads(said(capsys, "info", "--json"))
    assert facts["version"] == combiner.__version__ and facts["isa"] in facts["isas"]
    assert facts["numpy"] == np.__version__ and facts["threads"] == combiner.get_num_threads()
    text = said(capsys, "info", "--threads", "1")
    assert re.search(r"^threads +1$", text, re.MULTILINE) and text.count("\n") == len(facts)
    assert combiner.get_num_threads() == facts["threads"]


def test_compare(capsys, tmp_path):
    lines = said(capsys, "compare", "Fixed(8)", "LogSparse().sparse()", "--length", "64", "--causal").splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["dense", "Fixed(span=8)", "LogSparse().sparse()"]
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 30, 4))
    path = tmp_path / "mine.npz"
    np.savez(path, query=q, key=k, value=v)
    found = json.loads(said(capsys, "compare", "--npz", str(path), "Mixture(Fixed(4), Dense())", "--json"))
    expected = combiner.compare(q, k, v, combiner.Mixture(combiner.Fixed(4), combiner.Dense()), repeats=1)
    assert found["lines"][1]["out_error"] == expected[1].out_error and found["shape"] == [2, 30, 4]


def test_bench(capsys):
    arguments = "bench", "Fixed(16)", "--lengths", "64", "128", "--heads", "2", "--dim", "8", "--repeats", "1"
    found = json.loads(said(capsys, *arguments, "--json"))
    assert set(found["ours"]["Fixed(span=16)"]) == {"64", "128"}
    assert found["setting"]["passes"] == "forward" and found["setting"]["heads"] == 2
    text = said(capsys, *arguments, "--backward", "--no-causal")
    assert "forward + backward" in text and "bidirectional" in text and "L 128" in text
    for seconds in (*found["ours"].values(), *found["peers"].values()):
        assert all(0 < each < 60 for each in seconds.values())


@pytest.mark.parametrize("name", bench.PEERS)
def test_peers_compute_dense_attention(rng, capsys, name):
    """Their forward calls return what `Dense` does; they are timed where they are installed."""
    package, make = bench.PEERS[name]
    pytest.importorskip(package)
    arrays = list(rng.standard_normal((4, 2, 33, 8), np.float32))
    for is_causal in (True, False):
        exact = combiner.attention(*arrays[:3], combiner.Dense(), is_causal=is_causal)
        (out,) = np.asarray(make(arrays, is_causal, False)())
        out = out.swapaxes(0, 1) if package == "jax" else out
        np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)
    arguments = "Dense()", "--lengths", "32", "--repeats", "1", "--backward"
    found = json.loads(said(capsys, "bench", *arguments, "--json"))
    assert found["peers"][name]["32"] > 0


def test_without_peers_dense_is_timed_beside(capsys, monkeypatch):
    """Every pattern was "not at these lengths", beside a `Dense()` that was not timed."""
    monkeypatch.setattr(bench, "PEERS", {})
    seconds = itertools.cycle((1.0, 2.0))  # of the pattern and of Dense(), whatever else the machine does

    def fastest(call, repeats):
        call()
        return next(seconds)

    monkeypatch.setattr(bench, "fastest", fastest)
    arguments = "bench", "Window(1)", "--lengths", "2048", "--heads", "1", "--repeats", "1"
    assert set(json.loads(said(capsys, *arguments, "--json"))["ours"]) == {"Window(size=1)", "Dense()"}
    text = said(capsys, *arguments)
    assert "(Dense(); no peer is installed)" in text and "Window(size=1): from L 2,048 on" in text


def test_crossover():
    """From the end: one length at which a peer is faster ends it."""
    ours = {"a": {1: 9.0, 2: 1.0, 4: 1.0}, "b": {1: 1.0, 2: 1.0, 4: 9.0}, "c": {1: 1.0, 2: 1.0, 4: 1.0}}
    peers = {"x": {1: 2.0, 2: 2.0, 4: 2.0}, "y": {1: 3.0, 2: 3.0, 4: 3.0}}
    timings = Timings({}, ours, peers)
    assert timings.crossover == {"a": 2, "b": None, "c": 1}
    assert "busy" in str(Timings({"load": 3.0}, ours, peers)) and "busy" not in str(Timings({"load": 1.0}, ours, peers))
    assert "a: from L 2 on" in str(timings) and "b: not at these lengths" in str(timings)


def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name, arguments in (
        ("pattern.png", ["Fixed(8)", "--length", "40", "--causal"]),
        ("mixture.svg", ["Mixture(Fixed(8), LogSparse())"]),
        ("pairs.png", ["Fixed(8)", "LogSparse()", "--what", "pairs"]),
    ):
        path = tmp_path / name
        assert str(path) in said(capsys, "plot", *arguments, "--out", str(path))
        assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    path = tmp_path / "errors.png"
    said(capsys, "compare", "Fixed(8)", "--length", "32", "--out", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_demo(capfd, tmp_path):
    """All parts of the main job, at a size at which nothing is learned; its own exit codes."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "attention.png"
    assert main(["demo", "--quick", "--out", str(path)]) == 0
    assert "sparse Fixed" in capfd.readouterr().out and path.read_bytes().startswith(b"\x89PNG")
    assert main(["demo", "--colour"]) == 2 and "--colour" in capfd.readouterr().err
    assert main(["demo", "--help"]) == 0 and "example" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        ([], 2, "COMMAND"),
        (["colour"], 2, "colour"),
        (["compare"], 2, "PATTERN"),
        (["compare", "Fixed(0)"], 2, "span must be at least 1"),
        (["compare", "Routing([0])"], 2, "must be a pattern such as Fixed"),
        (["compare", "__import__('os')"], 2, "must be a pattern such as Fixed"),
        (["compare", "3"], 2, "must be a pattern such as Fixed"),
        (["compare", "(1).sparse()"], 2, "must be a pattern such as Fixed"),
        (["compare", "Fixed"], 2, r"Fixed must be called, as Fixed\(\.\.\)$"),
        (["compare", "Foo(3)"], 2, r"Foo\(3\) is none of these"),
        (["compare", "Fixed(8"], 2, "was never closed$"),
        (["compare", "Fixed(8)", "--length", "0"], 2, "must be at least 1, got 0"),
        (["compare", "Fixed(8)", "--length", "x"], 2, "invalid"),
        (["compare", "Fixed(8)", "--npz", "nowhere.npz"], 1, "combiner compare: .*nowhere.npz"),
        (["compare", "Fixed(8)", "Fixed(8)"], 1, "combiner compare: patterns must differ"),
        (["plot", "Fixed(8)"], 2, "--out"),
        (["plot", "Fixed(8)", "--out", "nowhere/x.png"], 1, "--out must be in a folder that exists, got nowhere"),
        (["compare", "Fixed(8)", "--out", "x.doc"], 1, "--out must be a picture, its name ending in .*png.*got x.doc"),
        (["plot", "Fixed(8)", "Dense()", "--out", "x.png"], 1, "combiner plot: a picture has one pattern"),
    ],
)
def test_refusals(capsys, arguments, code, says):
    try:
        assert main(arguments) == code
    except SystemExit as error:  # argparse's
        assert error.code == code
    captured = capsys.readouterr()
    assert re.search(says, captured.err) and not captured.out


def test_demo_refuses_a_span_of_nothing(capfd):
    """It was a traceback. The demo is a process of its own."""
    assert main(["demo", "--span", "0"]) == 2
    assert "--span must be at least 1, got 0" in capfd.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"combiner {combiner.__version__}\n"


def test_an_archive_without_the_arrays(capsys, tmp_path):
    np.savez(tmp_path / "x.npz", query=np.ones(3))
    assert main(["compare", "Fixed(8)", "--npz", str(tmp_path / "x.npz")]) == 1
    assert "must have arrays query, key, value, has query" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", None], ids=str)
def test_what_is_no_archive(capsys, tmp_path, content):
    """An empty file was a traceback, and so was a damaged archive."""
    path = tmp_path / "x.npz"
    if content is None:
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    else:
        path.write_bytes(content)
    assert main(["compare", "Fixed(8)", "--npz", str(path)]) == 1
    assert "--npz must be an archive as numpy.savez writes it" in capsys.readouterr().err


def test_every_command_has_help_with_an_example(capsys):
    for arguments in ([], ["info"], ["compare"], ["bench"], ["plot"]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and "example" in text and "combiner" in text
    assert set(re.findall(r"combiner (\w+)", EXAMPLES)) == {"info", "demo", "compare", "bench", "plot"}


def test_as_a_module_and_without_what_is_optional():
    """Exit codes are the process's; matplotlib, PyTorch and JAX are not needed until they are asked for."""
    done = run_python(
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'torch', 'jax', 'tqdm']))\n"
        "from combiner.cli import main\n"
        "assert main(['info']) == 0 and main(['compare', 'Fixed(8)', '--length', '32']) == 0\n"
        "sys.exit(main(['plot', 'Fixed(8)', '--out', 'x.png']))"
    )
    assert done.returncode == 1 and "pip install 'combiner-attention[plot]'" in done.stderr, done.stderr
    command = [sys.executable, "-m", "combiner", "info", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == combiner.__version__, done.stderr
    done = subprocess.run([*command[:3], "colour"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
