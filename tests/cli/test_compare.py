"""Several runs in one table."""

import json

import pytest

from mmdet_norms.cli import compare


def test_runs_stand_side_by_side(tmp_path, capsys):
    for name, box in (('bn', 0.4), ('bnet5', 0.45)):
        (tmp_path / name).mkdir()
        result = dict(bbox_mAP=box, bbox_mAP_l=-1.0, segm_mAP=box / 2)
        (tmp_path / name / 'results.json').write_text(json.dumps(result))
    compare.main([str(tmp_path / 'bn'), str(tmp_path / 'bnet5' / 'results.json')])
    rows = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line]
    assert len(rows) == 4 and '-1.0' not in rows[0]
    for row, value in zip(rows, ('0.400', '0.450', '0.200', '0.225')):
        assert value in row


@pytest.mark.parametrize('content, said', [(None, 'there is no'), ('{', 'is not a results.json')])
def test_a_missing_or_broken_file_is_one_message(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / 'results.json').write_text(content)
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path)])
    assert end.value.code == 2 and said in capsys.readouterr().err
