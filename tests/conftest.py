"""One thread: the same sums in the same order everywhere, and fast on tiny tensors."""

import signal

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "qiusuo", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("qiusuo")
