"""A student that goes on from an earlier one."""

import pytest
import torch
from transformers import AutoModel

from samdistill.checkpoints.student import start_from
from samdistill.students import StudentTrunkConfig
from samdistill.types import UserError


def trunk(hidden_size: int = 16):
    return AutoModel.from_config(StudentTrunkConfig(backbone="es_ev_s", hidden_size=hidden_size, image_size=126))


def test_it_has_every_weight_of_the_earlier_one(tmp_path) -> None:
    earlier = trunk()
    with torch.no_grad():
        for tensor in (*earlier.parameters(), *(b for b in earlier.buffers() if b.is_floating_point())):
            tensor.add_(0.25)
    earlier.save_pretrained(tmp_path / "student")
    for folder in (tmp_path, tmp_path / "student"):
        later = trunk()
        start_from(later, folder)
        assert all(torch.equal(later.state_dict()[name], tensor) for name, tensor in earlier.state_dict().items())


def test_another_student_is_refused(tmp_path) -> None:
    trunk().save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="wrong checkpoint"):
        start_from(trunk(32), tmp_path)
    with pytest.raises(UserError, match="no student of kind samdistill_student_trunk"):
        start_from(trunk(), tmp_path / "nowhere")
