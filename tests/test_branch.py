"""What goes to MLflow is never cut silently, and every name is one that it takes."""

from prostate_seg.tracking.branch import LONGEST_PARAM, _cut, _tag_key


def test_long_value_is_replaced_by_where_it_stands() -> None:
    assert _cut("x" * LONGEST_PARAM, LONGEST_PARAM) == "x" * LONGEST_PARAM
    assert _cut("x" * (LONGEST_PARAM + 1), LONGEST_PARAM) == "(6001 characters, see config.yaml and hydra/)"


def test_tag_keys_are_legal_and_distinct() -> None:
    assert _tag_key("md5.inputs/data/a b-1_2.nii.gz") == "md5.inputs/data/a b-1_2.nii.gz"
    assert _tag_key("md5.inputs/ü+(1)") == "md5.inputs/:fc::2b::28:1:29:"
    assert len(_tag_key("x" * 400)) <= 250
