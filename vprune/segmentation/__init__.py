"""From what a vision-language model attends to, to points, to masks: training-free segmentation."""
