"""What a result says of itself, at its edges; whole pages are in test_report."""

from __future__ import annotations

from dataclasses import replace

from samdistill.evaluation.result_story import concept_headline, concept_tiles, encoder_headline
from samdistill.evaluation.rows import ConceptRow, ModelRow

TEACHER = ConceptRow("t", 0.6, 0.7, 0.857, 0.8, 0.7, 0.5, 4_000_000, 100.0)
STUDENT = ConceptRow("s", 0.3, 0.5, 0.6, 0.6, 0.4, 0.25, 1_000_000, 200.0, 0.5)


def test_concepts_with_everything_measured():
    untrained = replace(STUDENT, name="untrained", cgf1=-0.03, kept=-0.05)
    assert concept_headline(STUDENT, TEACHER, untrained) == (
        "The distilled student keeps 50.0% of the teacher's cgF1 (0.300 of 0.600); untrained, it keeps 0.0%. "
        "It has 4.0 times fewer parameters and answers 2.0 times slower."
    )
    assert concept_tiles(STUDENT, TEACHER, untrained) == [
        ("of the teacher's cgF1", "50.0%", "untrained 0.0%"),
        ("pmF1", "0.500", "teacher 0.700"),
        ("IL_MCC", "0.600", "teacher 0.857"),
        ("mask AP", "0.250", "teacher 0.500"),
        ("parameters", "1.00 M", "teacher 4.00 M"),
        ("latency per question", "200 ms", "teacher 100 ms"),
    ]


def test_concepts_without_teacher_cost_or_objects():
    bare = replace(STUDENT, mask_ap=None, parameters=None, latency_ms=None, kept=None)
    assert concept_headline(bare, None, None) == "The distilled student reaches a cgF1 of 0.300."
    assert concept_tiles(bare, None, None) == [("cgF1", "0.300", ""), ("pmF1", "0.500", ""), ("IL_MCC", "0.600", "")]


def test_a_teacher_that_finds_nothing_keeps_no_share():
    blind = replace(TEACHER, cgf1=0.0, parameters=990_000, latency_ms=None)
    student = replace(STUDENT, kept=None)
    assert concept_headline(student, blind, replace(student, name="as it came", cgf1=0.1)) == (
        "The distilled student reaches a cgF1 of 0.300; as it came, 0.100. It has as many parameters as the teacher."
    )
    assert concept_tiles(student, blind, None)[0] == ("cgF1", "0.300", "teacher 0.000")


def test_an_encoder_without_objects_speaks_of_features_or_of_cost_alone():
    teacher, student = ModelRow("t", 3_000_000, 4_000_000), ModelRow("s", 1_000_000, 2_000_000, cosine=0.9)
    said = "The distilled student's features reach a cosine of 0.900 with the teacher's. "
    assert encoder_headline((), student, teacher, None) == said + "Its trunk is 3.0 times smaller."
    assert encoder_headline((), replace(student, cosine=None), teacher, None) == "Its trunk is 3.0 times smaller."
    same = replace(student, trunk_parameters=3_000_000)
    assert encoder_headline((), same, teacher, None).endswith("Its trunk is as large as the teacher's.")
