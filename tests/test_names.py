# SPDX-License-Identifier: Apache-2.0
"""Names: keywords of other libraries, attributes of the package, adapters without their framework."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from argument_problems import PATTERN, D, L, good, normal
from fresh import run_python

import combiner
from combiner import Dense

FOREIGN = [
    ("attn_mask", "key_mask, .*, is_causal=True is causality, combiner.Plan.from_mask makes a pattern"),
    ("mask", "key_mask"),
    ("block_mask", "Plan.from_mask"),
    ("key_padding_mask", "key_mask is its opposite"),
    ("causal", "is_causal=True is causality"),
    ("window_size", "combiner.Plan.from_mask makes one of a window"),
    ("sliding_window", "combiner.Plan.from_mask makes one of a window"),
    ("logits_soft_cap", "softcap bounds the logits"),
    ("alibi_slopes", "key_bias is a bias of every key, .*combiner.alibi_bias"),
    ("bias", "key_bias is a bias of every key"),
    ("attn_bias", "key_bias is a bias of every key"),
    ("score_mod", "key_bias is a bias of every key"),
    ("enable_gqa", "heads are grouped"),
    ("softmax_scale", "scale is the factor of the logits"),
    ("sm_scale", "scale is the factor of the logits"),
    ("dropout", "dropout_p is the share"),
    ("dropout_rate", "dropout_p is the share"),
    ("training", "dropout_p=0.0"),
    ("deterministic", "the same bits in every run"),
    ("need_weights", "combiner.attention_weights returns the weights"),
    ("return_attn_probs", "combiner.attention_weights returns the weights"),
    ("cu_seqlens_q", "cu_seqlens divides query, key and value alike"),
    ("max_seqlen_k", "cu_seqlens divides query, key and value alike"),
    ("sinks", "sink is its name"),
    ("s_aux", "sink is its name"),
]


@pytest.mark.parametrize("name, hint", FOREIGN, ids=lambda x: x.split()[0])
def test_a_keyword_of_another_library_says_what_to_use(name, hint):
    with pytest.raises(TypeError, match=rf"attention\(\) has no '{name}': .*{hint}") as caught:
        combiner.attention(**good(), **{name: None})
    assert caught.value.__suppress_context__


def test_only_names_that_something_stands_for_are_explained():
    x = normal(L, D)
    with pytest.raises(TypeError, match=r"attention\(\) got an unexpected keyword argument 'colour'"):
        combiner.attention(x, x, x, PATTERN, colour=1)
    with pytest.raises(TypeError, match=r"cluster\(\) got an unexpected keyword argument 'attn_mask'"):
        combiner.cluster(x, 2, attn_mask=None)
    with pytest.raises(TypeError, match=r"has no 'n_clusters': n is the number of clusters"):
        combiner.cluster(x, n_clusters=2)
    with pytest.raises(TypeError, match=r"Decoder\(\) has no 'softmax_scale': scale is"):
        combiner.Decoder(PATTERN, softmax_scale=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'pattern'"):
        combiner.attention(x, x, x)
    with pytest.raises(TypeError, match="scale must be a number"):
        combiner.attention(x, x, x, PATTERN, scale="x")


@pytest.mark.parametrize("name", [name for name in combiner.__all__ if name.islower()])
def test_signatures_are_the_functions_own(name):
    function = getattr(combiner, name)
    assert not {"args", "kwargs"} & set(inspect.signature(function).parameters)
    assert function.__name__ == name and function.__doc__


def test_a_sink_is_a_factor_of_the_output():
    """What the hint for `sinks` promises, against a softmax with one logit more."""
    q, k, v = normal(3, L, D)
    sink = 0.7
    out, lse = combiner.attention(q, k, v, Dense(), return_lse=True)
    logits = np.concatenate([q @ k.T / np.sqrt(D), np.full((L, 1), sink)], axis=1)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out / (1 + np.exp(sink - lse))[:, None], weights[:, :-1] @ v, rtol=1e-12)


def test_adapters_and_pictures_are_attributes():
    """`combiner.reference` and `combiner.plot` were AttributeErrors until something imported them."""
    code = """
import sys, combiner
assert not {"combiner.plot", "combiner.reference", "combiner.torch", "numpy.testing"} & set(sys.modules)
assert {"plot", "reference", "torch", "jax", "transformers", "distributed", "attention"} <= set(dir(combiner))
assert combiner.reference.attention and combiner.plot.draw_pattern
from combiner import reference
try:
    combiner.colour
except AttributeError as error:
    assert str(error) == "module 'combiner' has no attribute 'colour'", error
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module, lacks, extra",
    [
        ("torch", "torch", "torch"),
        ("distributed", "torch", "torch"),
        ("jax", "jax", "jax"),
        ("shard_map", "jax", "jax"),
        ("transformers", "torch", "transformers"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_an_adapter_without_its_framework_names_the_extra(module, lacks, extra):
    code = f"""
import sys
sys.modules[{lacks!r}] = None  # as if it were not there
import combiner
for ask in ("combiner.{module}", "__import__('combiner.{module}')", "exec('from combiner import {module}')"):
    try:
        eval(ask)
    except ImportError as error:
        assert str(error).startswith("combiner.{module} needs "), error
        assert "pip install 'combiner-attention[{extra}]'" in str(error), error
    else:
        raise AssertionError(ask)
"""
    done = run_python(code)
    if lacks == "transformers" and "No module named 'torch'" in done.stderr:
        pytest.skip("needs torch")
    assert done.returncode == 0, done.stderr


def test_the_source_folder_says_that_it_is_not_built(tmp_path):
    """Python started in a clone finds its sources before the package that is installed."""
    (tmp_path / "combiner").mkdir()
    for path in Path(combiner.__file__).parent.glob("*.py"):
        shutil.copy(path, tmp_path / "combiner")
    bare = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", "import combiner"]  # some site-packages have a _core for it
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert "has combiner's sources without its extension" in done.stderr, done.stderr
    assert "pip install -e ." in done.stderr and "partially initialized" not in done.stderr
    (tmp_path / "combiner" / "_core.py").write_text("import nothing_of_this_name")  # built, and broken
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert "No module named 'nothing_of_this_name'" in done.stderr and "sources" not in done.stderr
