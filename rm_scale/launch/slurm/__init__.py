"""Runs under Slurm: ready scripts, submitting them, watching them, and what a job's own nodes do.

On the machine where one types: `commands`, `options`, `render`, `submit`, `status`. Inside a job, started by
`slurm/common.sh`: `prepare` checks the allocation and the plan, `node` starts a node's ranks, `finish` judges the end.
"""
