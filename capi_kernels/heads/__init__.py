"""Both heads: the teacher's clustering head with the targets that it gives, and the student's loss.

`clustering_head`, `clustering_targets` and `student_loss` have the ops and the public functions, the files of these
names in `_cpu` and `_triton` what a CPU and a GPU run; `linear`, `cross_entropy` and `gradients` are what they share.
"""
