"""What old and new torch, and mmcv without its compiled part, need."""
