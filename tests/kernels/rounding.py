"""What one rounding costs, for tolerances."""

import torch

UNIT = 2.0**-24  # float32, in which kernels compute


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of rounding a float32 to `dtype`."""
    # to the nearest; Triton's interpreter cuts float32 off to bfloat16
    nearest = not (dtype == torch.bfloat16 and device.type == "cpu")
    return torch.finfo(dtype).eps * (0.5 if nearest else 1.0)


def within(found: torch.Tensor, expected: torch.Tensor, absolute: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that found, of `dtype`, is expected (float64) up to `absolute` and its last rounding."""
    assert found.dtype == dtype and found.shape == expected.shape
    # below the smallest normal number the spacing is absolute; the rounded value is off by `absolute` itself
    allowed = absolute + rounding(dtype, found.device) * (expected.abs() + absolute) + torch.finfo(dtype).tiny * 2**-10
    wrong = (found.double() - expected).abs() - allowed
    assert not found.isnan().any()
    assert wrong.max() <= 0, f"{(wrong > 0).sum()} of {wrong.numel()} beyond the tolerance, by up to {wrong.max():.2e}"
