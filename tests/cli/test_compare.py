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


def test_runs_of_other_kinds_are_shown_too(tmp_path, capsys):
    runs = dict(
        voc={'pascal_voc/mAP': 0.31, 'split': 'test'},
        semi={'teacher/coco/bbox_mAP': 0.29, 'student/coco/bbox_mAP': 0.28, 'iter': 7},
        nothing={'split': 'val', 'epoch': 3},
    )
    for name, result in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(json.dumps(result))
    compare.main([str(tmp_path / name) for name in runs])
    shown = capsys.readouterr().out
    assert 'teacher/coco/bbox average precision' in shown and '0.290' in shown and '0.280' in shown
    assert 'pascal_voc/mAP' in shown and '0.31' in shown and '│ epoch' not in shown
    assert f'{tmp_path / "nothing"}: the evaluation gave no results' in shown


@pytest.mark.parametrize('content', ['[]', '{"bbox_mAP": "n/a"}', '{"bbox_mAP": true}', '7', '[' * 100_000, '\x00'])
def test_json_that_is_no_result_is_one_message(content, tmp_path, capsys):
    (tmp_path / 'results.json').write_text(content)
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path)])
    assert end.value.code == 2 and 'is not a results.json' in capsys.readouterr().err


def test_numbers_of_a_checkpoint_that_did_not_fit_are_marked(tmp_path, capsys):
    partial = dict(checkpoint='[/b].pth', weights=7, started_anew=3)
    (tmp_path / 'results.json').write_text(json.dumps(dict(bbox_mAP=0.4, partial_checkpoint=partial)))
    compare.main([str(tmp_path)])
    assert '--allow-partial, 3 of 7 weights are not of the checkpoint' in capsys.readouterr().out


@pytest.mark.parametrize('key', ['bbox_mAP', 'accuracy'])
def test_a_number_that_is_no_float_is_one_message(key, tmp_path, capsys):
    (tmp_path / 'results.json').write_text(f'{{"{key}": {"9" * 400}}}')
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert f'(in {key}, a number of 400 digits)' in capsys.readouterr().err


def test_a_byte_order_mark_is_no_fault(tmp_path, capsys):
    (tmp_path / 'results.json').write_text('{"bbox_mAP": 0.4}', encoding='utf-8-sig')
    compare.main([str(tmp_path)])
    assert '0.400' in capsys.readouterr().out


def write(folder, name='results.json', **result):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(result))


def test_a_folder_of_work_dirs_is_each_of_them_and_rows_say_what_they_are_of(tmp_path, capsys):
    write(tmp_path / 'a', bbox_mAP=0.41, split='val', epoch=3)
    write(tmp_path / 'b' / 'deep', bbox_mAP=0.42, split='test', checkpoint='x/epoch_2.pth')
    write(tmp_path / 'b' / 'deep', 'results-test-epoch_1.json', bbox_mAP=0.43, split='test', checkpoint='epoch_1.pth')
    write(tmp_path / 'b' / 'deep', 'results-test-mine.json', bbox_mAP=0.44)
    (tmp_path / 'c').mkdir()
    compare.main([str(tmp_path)])
    rows = [
        [cell.strip() for cell in line.split('│')[1:4]]
        for line in capsys.readouterr().out.splitlines()
        if '0.4' in line
    ]
    assert rows == [
        [str(tmp_path / 'a'), 'val, epoch 3', '0.410'],
        [str(tmp_path / 'b/deep'), 'test, epoch_2.pth', '0.420'],
        [str(tmp_path / 'b/deep'), 'test, epoch_1.pth', '0.430'],
    ]


def test_a_folder_without_any_results_is_one_message(tmp_path, capsys):
    (tmp_path / 'c').mkdir()
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert 'nor in a folder below it' in capsys.readouterr().err
