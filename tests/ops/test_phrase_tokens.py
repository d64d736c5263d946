"""The end token against an index written by hand."""

import torch

from samdistill.ops.phrases import end_token


def test_the_end_token_is_the_last_one_before_the_padding() -> None:
    tokens = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(end_token(tokens, mask), torch.stack([tokens[0, 1], tokens[1, 3]]))
