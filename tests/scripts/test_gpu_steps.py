"""scripts/gpu_steps.py: kernels of a compiled program are counted by the scopes that they were traced in."""

from __future__ import annotations

import pathlib
import sys

import pytest

HLO = """HloModule step

%fused (x: f32[8]) -> f32[8] {
  ROOT %inside = f32[8]{0} negate(%x), metadata={op_name="jit(step)/draft/mlp/neg"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %dot = f32[8]{0} fusion(%x), backend_config={"kind":"__triton_gemm"}, metadata={op_name="jit(step)/mlp/dot"}
  %attend = (f32[8]{0}, f32[8]{0}) custom-call(%dot), metadata={op_name="jit(step)/draft/attention/attend/pallas_call"}
  %one = f32[8]{0} get-tuple-element(%attend), index=0
  %first = f32[8]{0} fusion(%one), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/draft/mlp/neg"}
  ROOT %second = f32[8]{0} fusion(%first), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/draft/mlp/neg"}
}

%behind (x: f32[8]) -> f32[8] {
  ROOT %outside = f32[8]{0} negate(%x)
}
"""


def test_kernels_are_counted_by_part_piece_and_kind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "scripts")
    monkeypatch.delitem(sys.modules, "gpu_steps", raising=False)
    from gpu_steps import kernels  # type: ignore[import-not-found]

    assert kernels(HLO) == {
        ("model", "mlp", "product"): 1, ("draft", "attend", "pallas"): 1, ("draft", "mlp", "fusion"): 2,
    }  # fmt: skip
