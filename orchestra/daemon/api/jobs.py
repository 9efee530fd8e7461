"""Routes of jobs: start, ask, wait, stop."""

from __future__ import annotations

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.daemon.jobs.job import Job, spec_from_json
from orchestra.errors import UsageError

# The longest that one request waits: who wants more asks again, and a daemon that is to stop is not held up.
_WAIT_MAX_S = 5.0


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_get("/v1/jobs", list_jobs)
    app.router.add_post("/v1/jobs", start_load)
    app.router.add_get("/v1/jobs/{id}", job_status)
    app.router.add_post("/v1/jobs/{id}/stop", stop_job)


async def list_jobs(request: web.Request) -> web.Response:
    """GET -> {jobs: [...]}, oldest first."""
    return answer({"jobs": [job.to_json() for job in request.app[NODE].jobs.all()]})


async def start_load(request: web.Request) -> web.Response:
    """POST {path, verify?, partial?, bandwidth_bytes_per_s?, list_file?, retry?} -> the job, new or under way.

    `list_file`: a file on this machine with a path a line. `retry`: only what failed in the last load of the path.
    """
    body = await body_of(request)
    jobs = request.app[NODE].jobs
    list_file = typed(body, "list_file", str, "")
    body["is_listed"] = bool(list_file)
    spec = spec_from_json({**body, "retry_of": ""})
    if typed(body, "retry", bool, False):
        last = jobs.last_of(spec.path)
        if not last.state.is_over:
            return answer(last.to_json())
        if not last.files_failed:
            raise UsageError(f"nothing to retry: no file failed in job {last.job_id} of {spec.path}")
        spec = spec_from_json({**body, "is_listed": False, "retry_of": last.job_id})
    return answer(jobs.submit(spec, list_file=list_file).to_json())


async def job_status(request: web.Request) -> web.Response:
    """GET ?wait_s= -> the job; with `wait_s` when its state has changed, or after that long."""
    jobs = request.app[NODE].jobs
    try:
        wait_s = min(_WAIT_MAX_S, max(0.0, float(request.query.get("wait_s", "0"))))
    except ValueError as error:
        raise UsageError(f"wait_s: expected seconds, got {request.query['wait_s']!r}") from error
    job_id = request.match_info["id"]
    job: Job = await jobs.wait(job_id, wait_s) if wait_s else jobs.get(job_id)
    return answer(job.to_json())


async def stop_job(request: web.Request) -> web.Response:
    """POST -> the job, stopped."""
    return answer((await request.app[NODE].jobs.stop(request.match_info["id"])).to_json())
