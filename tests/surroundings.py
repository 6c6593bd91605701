"""What a program may have set around a call."""

from contextlib import contextmanager

import torch


@contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "double, no gradients": lambda: (default_type(torch.float64), torch.no_grad()),
    "everything": lambda: (
        default_type(torch.bfloat16),
        default_device("meta"),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
    ),
}
