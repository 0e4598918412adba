# Published row mask-r101-gn: box AP 41.8, mask AP 36.8 (the authors quote it from another paper).
# mmdet's own config of that paper's row, under the name of this table.
# Its weights are those of Detectron, for BGR images; its warm-up starts at 0.001, and nothing is clipped.
_base_ = 'mmdet::gn/mask-rcnn_r101_fpn_gn-all_2x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
