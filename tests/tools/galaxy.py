"""Test the tool in a real Galaxy that is started for the occasion and leaves nothing behind.

    python tests/tools/galaxy.py            # lint and test the tool and the workflows
    python tests/tools/galaxy.py --serve    # only start the Galaxy, to look at it in a browser

Galaxy comes from its PyPI packages, installed beside the tool's own dependencies: jobs run in that
same environment, without conda. A Celery worker finishes uploads and jobs, because otherwise each
of them would import Galaxy anew, which takes half a minute.
"""

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import NamedTuple
from xml.sax.saxutils import quoteattr

import psutil
import yaml
from bioblend import ConnectionError as BioblendConnectionError
from bioblend.galaxy import GalaxyInstance

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "source_extractor.xml"
WORKFLOWS = ROOT / "workflows"
SCRIPTS = Path(sys.executable).parent

ADMIN_EMAIL = "admin@example.org"
START_TIMEOUT = 300
STOP_TIMEOUT = 15
TEST_TIMEOUT = 300

# The queue is a database because Kombu's file system transport may read a message before it is
# written, which ends the worker. No setting tells the database transport to look more often.
WORKER = """
from kombu.transport.sqlalchemy import Transport
Transport.polling_interval = 0.1
from galaxy.celery import celery_app
celery_app.worker_main(
    ["worker", "--concurrency=2", "--pool=threads", "--queues=galaxy.internal,galaxy.external"]
)
"""

# Checks that need the network, and one that depends on what the clone's directory is called.
LINT_SKIP = ("BioToolsValid",)
SHED_LINT_SKIP = (*LINT_SKIP, "version_bumped", "shed_remote_repository_url")


class Outcome(NamedTuple):
    """Whether a check passed, and what there is to say about it if it did not."""

    name: str
    passed: bool
    report: str
    seconds: float


class Galaxy(NamedTuple):
    """A running Galaxy."""

    url: str  # on the loopback interface
    admin_key: str
    user_key: str  # of a user who is an administrator too
    directory: Path  # holds all its files; removed when it has stopped
    environment: dict[str, str]  # for processes that work with it; their home is in `directory`

    def keys(self) -> dict[str, str]:
        """Environment variables for planemo; its arguments everybody on the machine could see."""
        names = "PLANEMO_GALAXY_ADMIN_KEY", "PLANEMO_GALAXY_USER_KEY"
        return dict(zip(names, (self.admin_key, self.user_key), strict=True))


@contextmanager
def running_galaxy() -> Iterator[Galaxy]:
    """Start a Galaxy that serves the tool, and stop and delete it at the end.

    Raises RuntimeError, with the end of the log, if Galaxy does not start.
    """
    with _exit_on_signals(), TemporaryDirectory(prefix="galaxy-") as name, ExitStack() as stack:
        directory = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        admin_key = secrets.token_hex(16)
        config = _write_config(directory, admin_key)
        environment = _environment(directory, config)

        web = [SCRIPTS / "galaxy-web", "-c", config, "-b", f"127.0.0.1:{port}", "-s", ADMIN_EMAIL]
        server = stack.enter_context(_process(web, directory / "web.log", environment))
        _wait_until_up(url, server, directory / "web.log")

        worker = [sys.executable, "-c", WORKER]
        stack.enter_context(_process(worker, directory / "worker.log", environment))

        users = GalaxyInstance(url, admin_key).users  # the bootstrap key has no account
        user = users.create_local_user("admin", ADMIN_EMAIL, secrets.token_hex(16))
        user_key = users.create_user_apikey(user["id"])
        yield Galaxy(url, admin_key, user_key, directory, environment)


def _write_config(directory: Path, admin_key: str) -> Path:
    """Write Galaxy's configuration files and return the path of the main one."""
    tool_conf, data_tables = directory / "tool_conf.xml", directory / "data_tables.xml"
    tool_conf.write_text(
        '<toolbox><section id="get" name="Get Data"><tool file="data_source/upload.xml"/></section>'
        f'<section id="tools" name="Tools"><tool file={quoteattr(str(TOOL))}/></section></toolbox>'
    )
    data_tables.write_text("<tables/>")
    settings = {
        **{"data_dir": str(directory / "data"), "tool_config_file": str(tool_conf)},
        **{"admin_users": ADMIN_EMAIL, "bootstrap_admin_api_key": admin_key},
        "tool_data_table_config_path": str(data_tables),
        "static_dir": str(ROOT / "static"),  # for the picture in the help
        **dict.fromkeys(("conda_auto_init", "conda_auto_install", "involucro_auto_init"), False),
        "enable_celery_tasks": True,
        "metadata_strategy": "directory_celery",
        "celery_conf": {
            "broker_url": f"sqla+sqlite:///{directory}/queue.sqlite",
            "result_backend": f"db+sqlite:///{directory}/results.sqlite",
            "task_routes": {
                f"galaxy.{task}": "galaxy.external" for task in ("fetch_data", "set_job_metadata")
            },
        },
    }
    config = directory / "galaxy.yml"
    config.write_text(yaml.safe_dump({"galaxy": settings}))
    return config


def _environment(directory: Path, config: Path) -> dict[str, str]:
    """Environment that holds Galaxy's and planemo's files in the directory."""
    home, temporary = directory / "home", directory / "tmp"
    home.mkdir()
    temporary.mkdir()
    others = "GALAXY_", "PLANEMO_", "XDG_"
    inherited = {key: text for key, text in os.environ.items() if not key.startswith(others)}
    return inherited | {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "GALAXY_CONFIG_FILE": str(config),
    }


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Turn the signals that would end Python at once into an orderly exit."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _process(command: list, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Run a process in a session of its own, and end the whole session at the end."""
    with log.open("wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        place = {"cwd": log.parent, "env": environment, "start_new_session": True}
        process = subprocess.Popen(command, **streams, **place)
    try:
        yield process
    finally:
        _end_session(process)


def _end_session(leader: subprocess.Popen) -> None:
    """End a process and its descendants, jobs in process groups of their own included."""
    for action in (psutil.Process.terminate, psutil.Process.kill):
        members = [p for p in psutil.process_iter() if _session(p.pid) == leader.pid]
        for member in members:
            with suppress(psutil.NoSuchProcess):
                action(member)
        psutil.wait_procs(members, timeout=STOP_TIMEOUT)
    leader.wait()


def _session(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(pid)


def _wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    galaxy = GalaxyInstance(url)
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            galaxy.config.get_version()
            return
        except BioblendConnectionError:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                raise RuntimeError(f"Galaxy did not start:\n{tail}") from None
            time.sleep(0.5)


def check(galaxy: Galaxy) -> Iterator[Outcome]:
    """Lint and test the tool and the workflows in a Galaxy."""
    strict = ["--report_level", "all", "--fail_level", "warn", "--skip"]
    yield _lint(galaxy, ["lint", *strict, ",".join(LINT_SKIP), TOOL])
    yield from _test(galaxy, TOOL)
    yield _lint(galaxy, ["workflow_lint", *strict[:-1], WORKFLOWS])
    for workflow in sorted(WORKFLOWS.glob("*.gxwf.yml")):
        yield from _test(galaxy, workflow)
    yield _lint(galaxy, ["shed_lint", "--tools", *strict, ",".join(SHED_LINT_SKIP), ROOT])


def _lint(galaxy: Galaxy, arguments: list) -> Outcome:
    start = time.monotonic()
    done = _planemo(galaxy, arguments)
    seconds = time.monotonic() - start
    return Outcome(f"planemo {arguments[0]}", done.returncode == 0, done.stdout, seconds)


def _test(galaxy: Galaxy, path: Path) -> Iterator[Outcome]:
    """Run the tests of a tool or a workflow."""
    results = galaxy.directory / f"{path.name}.json"
    start = time.monotonic()
    done = _planemo(galaxy, [*planemo_test(galaxy), "--test_output_json", results, path])
    tests = json.loads(results.read_text())["tests"] if results.exists() else []
    for test in tests:
        data = test["data"]
        seconds = data.get("time_seconds") or time.monotonic() - start
        yield Outcome(f"test {test['id']}", data["status"] == "success", _report(data), seconds)
    failed = any(test["data"]["status"] != "success" for test in tests)
    if not tests or (done.returncode != 0 and not failed):
        yield Outcome(f"planemo test {path.name}", False, done.stdout, time.monotonic() - start)


def planemo_test(galaxy: Galaxy) -> list[str]:
    """Arguments that make planemo run tests in this Galaxy."""
    return [
        *("test", "--engine", "external_galaxy", "--galaxy_url", galaxy.url),
        *("--no_shed_install", "--test_timeout", str(TEST_TIMEOUT)),
        *("--test_output", str(galaxy.directory / "report.html")),
    ]


def _planemo(galaxy: Galaxy, arguments: list) -> subprocess.CompletedProcess:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [SCRIPTS / "planemo", *arguments]
    environment = galaxy.environment | galaxy.keys()
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, **streams)


def _report(data: dict) -> str:
    """Say what went wrong in a test: planemo's findings, and what its jobs wrote."""
    problems = [data["execution_problem"], *(data["output_problems"] or [])]
    steps = (data["invocation_details"] or {}).get("steps", {}).values()
    jobs = [data["job"], *(job for step in steps for job in step["jobs"])]
    written = [
        f"job {job['id']} {name}:\n{job[name]}"
        for job in filter(None, jobs)
        for name in ("command_line", "stdout", "stderr")
        if job[name]
    ]
    return "\n".join(map(str, [*filter(None, problems), *written]))


def report(outcomes: Iterable[Outcome]) -> int:
    """Print each outcome as it comes, and their count; return 1 if any is a failure, else 0."""
    passed = []
    for outcome in outcomes:
        passed.append(outcome.passed)
        verdict = "passed" if outcome.passed else "FAILED"
        print(f"{verdict} {outcome.name} ({outcome.seconds:.1f} s)", flush=True)
        if not outcome.passed:
            print(indent(outcome.report, "    "), flush=True)
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return int(not all(passed))


def main(argv: list[str] | None = None) -> int:
    """Run the checks, or serve the tool until interrupted; return the exit status."""
    parser = argparse.ArgumentParser(description="Test the tool in a real Galaxy.")
    text = "only start the Galaxy, and wait for Ctrl-C"
    parser.add_argument("--serve", action="store_true", help=text)
    args = parser.parse_args(argv)

    start = time.monotonic()
    with running_galaxy() as galaxy:
        print(f"Galaxy is up at {galaxy.url} ({time.monotonic() - start:.0f} s)", flush=True)
        if args.serve:
            keys = (f"{name}={key}" for name, key in galaxy.keys().items())
            print("Run a test with:", *keys, "planemo", *planemo_test(galaxy), TOOL, flush=True)
            with suppress(KeyboardInterrupt):
                signal.pause()
            return 0
        return report(check(galaxy))


if __name__ == "__main__":
    sys.exit(main())
