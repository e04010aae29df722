"""The kernel with the update in its epilogue, in Triton's interpreter: no GPU, but the very code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import adapted, prompts, tiny
from torch import Tensor

from more_ds.tuners.more import products

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")  # of which `conftest.py` wants the interpreter


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(("m", "k", "n", "r"), [(70, 48, 96, 8), (33, 100, 40, 24), (1, 16, 16, 1), (130, 64, 20, 16)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.float16, 0.05)])
def test_products_are_torchs(m: int, k: int, n: int, r: int, dtype: torch.dtype, close: float) -> None:
    """Shapes that no tile divides, ranks below and above a block's, the thin factor with its tokens in memory."""
    own = products.triton_products(torch.device("cpu"), dtype)
    assert own is not products.TORCH
    x, weight, bias, z, b = draw(m, k), draw(n, k), draw(n), draw(r, m).T, draw(n, r)
    dy, a = draw(m, n), draw(r, k)

    def run(function: products.Products, *types: torch.dtype) -> list[Tensor]:
        found = []
        for offset in (bias, None):
            of = [None if t is None else t.to(*types) for t in (x, weight, offset, z, b)]
            found.append(function.outputs(*of))
        return [*found, function.inputs(*(t.to(*types) for t in (dy, weight, z, a)))]

    for ours, exact in zip(run(own, dtype), run(products.TORCH, torch.float64), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=close, atol=close * 4)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from more_ds.tuners.more import triton_products

kernel, names = triton_products._kernel.fn, triton_products._kernel.fn.arg_names
for capability in (80, 90):
    for tiling in triton_products._tilings():
        fixed = {"M_BITS": 8, "HAS_BIAS": True, "BLOCK_R": 16, "PRECISION": "ieee", **tiling.kwargs}
        tensors = ("left", "right", "bias", "thin", "wide", "out")
        types = {n: "constexpr" if n in fixed else "*bf16" if n in tensors else "i32" for n in names}
        source = ASTSource(kernel, types, constexprs={(names.index(n),): value for n, value in fixed.items()})
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tiling.num_warps})
        assert "mma" in made.asm["ptx"], "no tensor cores"
        print(capability, len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_compiles_for_a100_and_h200() -> None:
    """Triton brings its own assembler: no GPU is needed to know that the kernel compiles for one."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * 8


def test_a_step_is_the_fused_one() -> None:
    found = {}
    for backend in ("fused", "triton"):
        model = adapted("llama", tiny("llama").float(), backend=backend).float().train()
        loss = model(**prompts()).loss
        loss.backward()
        found[backend] = loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert isinstance(model.base_model.context.step.products, products.Products)
    assert model.base_model.context.step.products is not products.TORCH
    torch.testing.assert_close(found["triton"], found["fused"], rtol=1e-4, atol=1e-5)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from more_ds.tuners.more import triton_products

    products.triton_products.cache_clear()
    monkeypatch.setattr(triton_products, "inputs", lambda dy, weight, dz, a: dy @ weight)
    assert products.triton_products(torch.device("cpu"), torch.float32) is products.TORCH
    assert "does not give what torch gives here" in capsys.readouterr().out
    products.triton_products.cache_clear()

    def fails(*_: object) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(triton_products, "outputs", fails)
    assert products.triton_products(torch.device("cpu"), torch.float32) is products.TORCH
    assert "does not run here (RuntimeError: no kernel image" in capsys.readouterr().out
    products.triton_products.cache_clear()
