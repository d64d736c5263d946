"""Small students that fit the hosts of these tests."""

import torch

from samdistill.students import StudentTrunk, StudentTrunkConfig

HIDDEN = 64


def make_student(head: str = "published", **settings) -> StudentTrunk:
    config = {"backbone": "es_ev_s", "head": head, "hidden_size": HIDDEN, "image_size": 126} | settings
    torch.manual_seed(1)
    student = StudentTrunk(StudentTrunkConfig(**config)).eval()
    for name, buffer in student.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()  # statistics of training, which a merge must carry over
    return student
