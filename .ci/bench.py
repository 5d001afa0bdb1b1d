"""Measure celery-s3 beside Celery's built-in S3 backend (boto3), and print a Markdown table.

    python .ci/bench.py          # about three minutes
    python .ci/bench.py --short  # about one: a quarter of everything

It needs `moto[server]` and boto3, and measures the `celery_s3.py` of this checkout. The ratio is
the built-in's figure over celery-s3's. The floor is what botocore alone takes to sign one request
and to send it. moto, in a process of its own, answers where CPU and memory are measured; it ends
each connection, so that everybody pays for a new one. Joins, chords and waiting go to a dict.
"""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median

import celery.backends.base
import celery.result
import urllib3
from botocore import auth, awsrequest, credentials, httpsession
from celery.contrib.testing.worker import start_worker
from celery.result import AsyncResult, GroupResult

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {'celery-s3': 'celery_s3.S3Backend', 'built-in': 's3://'}
BUCKETS = {'s3_bucket': 'results', 's3_backend_settings': {'bucket': 'results'}}
RESULT = {'rows': 1200, 'file': 'reports/2025/11/report.csv'}
ROUND_TRIP = 0.03  # seconds
CALLS = 5  # in a row, for one sample of CPU
PATIENCE = 180  # seconds, for a chord

MOTO = """
import sys, urllib.request
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer('127.0.0.1', port=0)
server.start()
endpoint = 'http://%s:%s' % server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(f'{endpoint}/results', method='PUT'))  # the bucket
print(endpoint, flush=True)
sys.stdin.read()  # until the benchmark ends
"""

COLD_START = """
import json, os, sys, threading, time
import celery.backends.base, celery.result

def used():
    with open('/proc/self/statm') as file:
        pages = int(file.read().split()[1])
    return time.process_time() * 1e3, pages * os.sysconf('SC_PAGE_SIZE') / 1e6

def get():
    celery.result.AsyncResult('there', app=app).get()

app = celery.Celery(backend=sys.argv[1])
app.conf.update(json.loads(sys.argv[2]))
begun = used()
app.backend
made = used()
get()
first = used()
thread = threading.Thread(target=get)
thread.start()
thread.join()
print(json.dumps([begun, made, first, used()]))
"""


class Wire:
    """Takes the place of `URLLib3Session.send`, through which boto3 goes as well."""

    def __init__(self):
        self.counts = Counter()  # of requests, by method
        self.objects = None  # by URL; None: the server answers
        self.round_trip = 0.0  # seconds
        self.lock = threading.Lock()
        self.original = httpsession.URLLib3Session.send
        httpsession.URLLib3Session.send = lambda http, request: self.send(http, request)

    def count(self, call) -> Counter:
        """The requests of a call, by method."""
        self.counts.clear()
        call()
        return Counter(self.counts)

    def send(self, http, request):
        with self.lock:
            self.counts[request.method] += 1
        if self.objects is None:
            return self.original(http, request)
        time.sleep(self.round_trip)
        with self.lock:
            status, content = self.answer(request.method, request.url, request)
            etag = make_etag(self.objects.get(request.url, b''))
        headers = {'etag': etag, 'content-length': str(len(content))}
        body = io.BytesIO(b'' if request.method == 'HEAD' else content)
        raw = urllib3.HTTPResponse(body, headers, status, preload_content=False)
        return awsrequest.AWSResponse(request.url, status, headers, raw)

    def answer(self, method, url, request) -> tuple[int, bytes]:
        """Do with the objects what AWS does: the status and the content."""
        found, expected = self.objects.get(url), request.headers.get('If-Match')
        if method == 'DELETE':
            self.objects.pop(url, None)
            return 204, b''
        if found is None and (method != 'PUT' or expected):
            return 404, b'<Error><Code>NoSuchKey</Code></Error>'
        if method != 'PUT':
            return 200, found
        unwanted = found is not None and 'If-None-Match' in request.headers
        if unwanted or (expected and expected != make_etag(found)):
            return 412, b'<Error><Code>PreconditionFailed</Code></Error>'
        self.objects[url] = request.body
        return 200, b''


def make_etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class Clock:
    """Takes the place of the module `time`: a sleep lasts no time, but results appear in it."""

    def __init__(self, objects: dict, ends: list):
        self.now = 0.0
        self.objects = objects
        self.later = list(zip(ends, objects.items()))
        objects.clear()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float):
        self.now += seconds
        self.objects.update(item for end, item in self.later if end <= self.now)


def make_app(name: str) -> celery.Celery:
    app = celery.Celery(broker='memory://', backend=BACKENDS[name])
    app.conf.update(BUCKETS, broker_transport_options={'polling_interval': 0.01})
    return app


def make_group(name: str, size: int) -> GroupResult:
    """A group whose results are stored, each task's its own id."""
    app = make_app(name)
    group = GroupResult('group', [AsyncResult(f'{n}', app=app) for n in range(size)], app=app)
    for result in group:
        app.backend.store_result(result.id, result.id, 'SUCCESS')
    return group


def make_calls(name: str) -> dict:
    """What is done with one task at a time."""
    app = make_app(name)
    store = app.backend.store_result

    def store_twice():
        store('twice', {}, 'STARTED')
        store('twice', RESULT, 'SUCCESS')

    store('there', RESULT, 'SUCCESS')
    return {
        'get': lambda: AsyncResult('there', app=app).get(),
        'set': lambda: store(os.urandom(16).hex(), RESULT, 'SUCCESS'),
        'pending poll': lambda: AsyncResult('missing', app=app).state,
        'STARTED, then SUCCESS': store_twice,
        'forget': lambda: AsyncResult('twice', app=app).forget(),
    }


def make_floor() -> dict:
    """The calls that take one request, with nothing but the request."""
    http = httpsession.URLLib3Session()
    signer = auth.S3SigV4Auth(credentials.ReadOnlyCredentials('any', 'any', None), 's3', 'any')

    def send(method: str, task_id: str, body: bytes = b'') -> bytes:
        url = f'{os.environ["AWS_ENDPOINT_URL"]}/results/celery-task-meta-{task_id}'
        request = awsrequest.AWSRequest(method, url, data=body)
        signer.add_auth(request)
        return http.send(request.prepare()).content

    value = send('GET', 'there')
    return {
        'get': lambda: send('GET', 'there'),
        'set': lambda: send('PUT', os.urandom(16).hex(), value),
        'pending poll': lambda: send('GET', 'missing'),
    }


def measure_cpu(calls: dict, rounds: int) -> dict:
    """The median microseconds of each call, by name, in rounds of all of them."""
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            calls[name]()  # whoever comes first after another finds nothing in the caches
            began = time.process_time()
            for _ in range(CALLS):
                calls[name]()
            samples[name].append((time.process_time() - began) / CALLS * 1e6)
    return {name: median(samples[name]) for name in samples}


def measure_cold_start(name: str, processes: int) -> list:
    """The medians of processes that have imported Celery: CPU and memory of three first uses."""
    command = [sys.executable, '-c', COLD_START, BACKENDS[name], json.dumps(BUCKETS)]
    runs = [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(processes)]
    return [[median(run[k + 1][n] - run[k][n] for run in runs) for n in (0, 1)] for k in range(3)]


def count_waiting(name: str, wire: Wire, ends: list) -> Counter:
    """The requests for tasks that end at these seconds of a clock that jumps."""
    modules = sys.modules['celery_s3'], celery.backends.base, celery.result
    wire.objects = {}
    group = make_group(name, len(ends))
    clock = Clock(wire.objects, ends)
    for module in modules:
        module.time = clock
    counts = wire.count(group.get if len(ends) > 1 else group[0].get)
    for module in modules:
        module.time = time
    return counts


def measure_join(name: str, wire: Wire, size: int) -> float:
    """The seconds until a group's results are there, all of them stored before."""
    wire.objects = {}
    group = make_group(name, size)
    wire.round_trip = ROUND_TRIP
    began = time.perf_counter()
    assert group.get() == [result.id for result in group]
    wire.round_trip = 0.0
    return time.perf_counter() - began


def run_chord(name: str, wire: Wire, size: int, threads: int) -> tuple[float, Counter]:
    """The seconds until a chord's body runs, and the requests of each part."""
    app, ended = make_app(name), threading.Event()
    part = app.task(name='part')(lambda number: number)
    body = app.task(name='body', ignore_result=True)(lambda numbers: ended.set())
    wire.objects = {}
    with start_worker(app, threads, 'threads', perform_ping_check=False, shutdown_timeout=PATIENCE):
        wire.counts.clear()
        wire.round_trip = ROUND_TRIP
        began = time.perf_counter()
        celery.chord(part.s(number) for number in range(size))(body.s())
        assert ended.wait(PATIENCE)
        seconds = time.perf_counter() - began
    wire.round_trip = 0.0
    return seconds, Counter({method: wire.counts[method] / size for method in wire.counts})
