"""Routes of jobs: start, ask, wait, stop."""

from __future__ import annotations

import dataclasses

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.daemon.jobs.job import Job, LoadSpec, spec_from_json
from orchestra.daemon.jobs.runner import JobRunner
from orchestra.daemon.nodes.jobs import ROUTE
from orchestra.errors import UsageError

# The longest that one request waits: who wants more asks again, and a daemon that is to stop is not held up.
_WAIT_MAX_S = 5.0


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_get("/v1/jobs", list_jobs)
    app.router.add_post("/v1/jobs", start_load)
    app.router.add_get("/v1/jobs/{id}", job_status)
    app.router.add_post("/v1/jobs/{id}/stop", stop_job)


def add_own_routes(app: web.Application) -> None:
    """Add the routes that other nodes of the cluster ask: about this node's jobs alone."""
    app.router.add_get(ROUTE, list_own_jobs)
    app.router.add_post(ROUTE, retry_own_load)
    app.router.add_get(ROUTE + "/{id}", own_job_status)
    app.router.add_post(ROUTE + "/{id}/stop", stop_own_job)


async def list_jobs(request: web.Request) -> web.Response:
    """GET -> {jobs: [...]}, oldest first; those of all nodes in a cluster."""
    control = request.app[NODE].nodes
    if control is None:
        return await list_own_jobs(request)
    return answer({"jobs": await control.jobs.all()})


async def list_own_jobs(request: web.Request) -> web.Response:
    """GET -> {jobs: [...]}, oldest first."""
    return answer({"jobs": [job.to_json() for job in request.app[NODE].jobs.all()]})


async def start_load(request: web.Request) -> web.Response:
    """POST {path, verify?, partial?, bandwidth_bytes_per_s?, list_file?, retry?, replicas?} -> the job, new or running.

    `list_file`: a file on this machine with a path a line. `retry`: only what failed in the last load of the path.
    """
    body = await body_of(request)
    jobs = request.app[NODE].jobs
    list_file = typed(body, "list_file", str, "")
    body["is_listed"] = bool(list_file)
    spec = spec_from_json({**body, "retry_of": ""})
    if spec.replicas and request.app[NODE].nodes is None:
        raise UsageError("replicas: this machine stands alone; more than one copy needs a table [cluster]")
    control = request.app[NODE].nodes
    if control is not None:
        await control.jobs.wait_listed()
    if typed(body, "retry", bool, False):
        if control is not None:
            own_s = jobs.last_of(spec.path).created_s if jobs.has_path(spec.path) else 0.0
            retried = await control.jobs.retry(spec.to_json(), newer_than_s=own_s)
            if retried is not None:
                return answer(retried)
        return answer(_retry(jobs, spec).to_json())
    if control is not None and not spec.is_listed and not jobs.has_path(spec.path, running=True):
        led = await control.jobs.running(spec)
        if led is not None:
            return answer(led)
    return answer(jobs.submit(spec, list_file=list_file).to_json())


async def retry_own_load(request: web.Request) -> web.Response:
    """POST as for `start_load` with `retry`, asked by another node: of the last load that this node led."""
    spec = spec_from_json({**await body_of(request), "is_listed": False, "retry_of": ""})
    return answer(_retry(request.app[NODE].jobs, spec).to_json())


def _retry(jobs: JobRunner, spec: LoadSpec) -> Job:
    """Load what failed in the last load of that path, or join it while it runs."""
    last = jobs.last_of(spec.path)
    if not last.state.is_over:
        return last
    if not last.files_failed:
        raise UsageError(f"nothing to retry: no file failed in job {last.job_id} of {spec.path}")
    return jobs.submit(dataclasses.replace(spec, is_listed=False, retry_of=last.job_id))


async def job_status(request: web.Request) -> web.Response:
    """GET ?wait_s= -> the job; with `wait_s` when its state has changed, or after that long."""
    node, job_id = request.app[NODE], request.match_info["id"]
    if node.nodes is None or node.jobs.has(job_id):
        return await own_job_status(request)
    return answer(await node.nodes.jobs.get(job_id, _wait_s(request)))


async def own_job_status(request: web.Request) -> web.Response:
    """As `job_status`, of a job of this node."""
    jobs, wait_s = request.app[NODE].jobs, _wait_s(request)
    job_id = request.match_info["id"]
    job: Job = await jobs.wait(job_id, wait_s) if wait_s else jobs.get(job_id)
    return answer(job.to_json())


def _wait_s(request: web.Request) -> float:
    try:
        return min(_WAIT_MAX_S, max(0.0, float(request.query.get("wait_s", "0"))))
    except ValueError as error:
        raise UsageError(f"wait_s: expected seconds, got {request.query['wait_s']!r}") from error


async def stop_job(request: web.Request) -> web.Response:
    """POST -> the job, stopped."""
    node, job_id = request.app[NODE], request.match_info["id"]
    if node.nodes is None or node.jobs.has(job_id):
        return await stop_own_job(request)
    return answer(await node.nodes.jobs.stop(job_id))


async def stop_own_job(request: web.Request) -> web.Response:
    """As `stop_job`, of a job of this node."""
    return answer((await request.app[NODE].jobs.stop(request.match_info["id"])).to_json())
