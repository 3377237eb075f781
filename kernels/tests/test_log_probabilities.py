"""Log-probabilities beside torch's in float64, on the device that is there.

Run by `nix run .#ci-test`, or by hand with LOCAL_KERNELS naming a folder that holds `build/`;
without a GPU under TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from kernels import get_kernel

kernel = get_kernel("fastpref/fastpref-kernels", version=1, trust_remote_code=True)


@pytest.fixture(scope="module")
def device():
    found = [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]
    if not found and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU")
    return found[0] if found else "cpu"


def random(device, dtype):
    """Rows that fill no block, a vocabulary that is a prime."""
    torch.manual_seed(0)
    hidden = torch.randn(37, 64).to(device, dtype)
    weight = (0.3 * torch.randn(257, 64)).to(device, dtype)
    return hidden, weight, torch.randint(0, 257, (37,), device=device)


def expected(hidden, weight, targets, softcap=None):
    """Log-probabilities, and the error allowed them.

    A sum of H products is off by at most H roundings of the sum of their magnitudes, each of 2⁻²³
    where tensor cores truncate; the log-probability by that of the target's logit and by the
    largest of the others, and a softcap makes neither larger. Twelve more roundings of the largest
    value in question are left to exponentials, tanh and sums.
    """
    h, w = hidden.double().cpu(), weight.double().cpu()
    logits = h @ w.T
    of_products = h.shape[1] * 2**-23 * (h.abs() @ w.abs().T).amax(1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(-1, targets.cpu()[:, None]).squeeze(-1)
    largest = logits.abs().amax(1) + logps.abs()
    return logps, 2 * of_products + 12 * 2**-23 * largest


def assert_within(found, logps, allowed):
    assert found.dtype == torch.float32
    errors = (found.double().cpu() - logps).abs()
    assert (errors <= allowed).all(), (errors / allowed).max()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_projection(dtype, softcap, device):
    hidden, weight, targets = random(device, dtype)
    epilogue = kernel.Epilogue(softcap=softcap)
    found, _, _ = kernel.projection_statistics(hidden, weight, targets, epilogue)
    assert_within(found, *expected(hidden, weight, targets, softcap))


@pytest.mark.kernels_ci
def test_rows_of_products(device):
    hidden, weight, targets = random(device, torch.float32)
    products = hidden @ weight.T
    found, _, _ = kernel.row_statistics(products, targets, kernel.Epilogue())
    assert_within(found, *expected(hidden, weight, targets))
