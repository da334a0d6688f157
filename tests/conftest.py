"""For every test: small models gain nothing from threads, and lose much where the machine is busy."""

import torch

torch.set_num_threads(
    1
)  # a conversion of a tiny model beside one busy core: 28 s with two threads, 0.4 s with one
