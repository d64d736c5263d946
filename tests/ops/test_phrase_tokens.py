"""The end token against an index written by hand, and attention to padding against transformers' encoder."""

from __future__ import annotations

import copy

import torch

from samdistill.ops.phrases import end_token, follow_padding
from samdistill.students import TextStudent, TextStudentConfig

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "width": 8,
         "projection_dim": 16, "vocab_size": 40, "max_position_embeddings": 6}  # fmt: skip
IDS = torch.tensor([[5, 7, 9, 39, 39, 39], [5, 8, 8, 8, 8, 9]])
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])


def student(**settings) -> TextStudent:
    torch.manual_seed(0)
    made = TextStudent(TextStudentConfig(**SMALL, **settings))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@torch.no_grad()
def test_padding_is_read_as_id_zero_if_the_configuration_says_so() -> None:
    attending, masking = student(attend_padding=True), student()
    found = attending(IDS, MASK)
    # by hand: transformers' encoder without a mask, on ids that are zero where the mask is
    plain = masking.text_encoder(input_ids=torch.where(MASK == 1, IDS, 0)).last_hidden_state
    wanted = masking.text_projection(plain)
    torch.testing.assert_close(found.last_hidden_state, wanted)
    torch.testing.assert_close(found.pooler_output, torch.stack([wanted[0, 2], wanted[1, 5]]))
    masked = masking(IDS, MASK).last_hidden_state
    assert (masked[0, :3] - wanted[0, :3]).abs().max() > 0.01  # it matters
    torch.testing.assert_close(masked[1], wanted[1])  # a phrase without padding


@torch.no_grad()
def test_it_survives_saving_copying_and_a_second_call(tmp_path) -> None:
    made = student(attend_padding=True)
    wanted = made(IDS, MASK).last_hidden_state
    made.save_pretrained(tmp_path)
    follow_padding(made)
    for other in (TextStudent.from_pretrained(tmp_path).eval(), copy.deepcopy(made), made):
        torch.testing.assert_close(other(IDS, MASK).last_hidden_state, wanted)


@torch.no_grad()
def test_an_exported_program_reads_padding_too() -> None:
    made = student(attend_padding=True)
    program = torch.export.export(made.text_encoder, (), {"input_ids": IDS, "attention_mask": MASK})
    found = program.module()(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(made.text_projection(found), made(IDS, MASK).last_hidden_state)


def test_the_end_token_is_the_last_one_before_the_padding() -> None:
    tokens = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(end_token(tokens, mask), torch.stack([tokens[0, 1], tokens[1, 3]]))
