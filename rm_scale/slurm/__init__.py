"""Runs under Slurm: ready job scripts, submitting and watching them, and what the nodes of a job do.

Where a user types: `job_options`, `site`, `render`, `submit`, `planned_job` and `status`. Inside a job, where
`slurm/common.sh` calls them: `prepare` checks allocation and plan, `node` starts ranks, `requeue` decides the end.
"""
