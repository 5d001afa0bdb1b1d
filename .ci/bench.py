"""Measure celery-s3 beside Celery's built-in S3 backend (boto3), and print a Markdown table.

    python .ci/bench.py [--short]

Run it in the root of a checkout with `moto[server]` and boto3: three minutes or, with a fifth of
the rounds, one. The ratio is the built-in's figure over celery-s3's; the floor is what botocore
takes to sign and send a request or, for a join, what fifty bare threads take. First moto answers,
in a process of its own, and ends each connection; from 'wait' on, a dict does.
"""

import io
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import md5
from importlib.metadata import version
from statistics import median
from subprocess import DEVNULL, PIPE, Popen, check_output
from unittest.mock import Mock, patch

import celery
from botocore import auth, awsrequest, credentials, httpsession
from celery.app.task import Context
from celery.contrib.testing.worker import start_worker
from celery.result import AsyncResult, GroupResult
from urllib3 import HTTPResponse

BACKENDS = 'celery_s3.S3Backend', 's3://'
RESULT = {'rows': 1200, 'file': 'reports/2025/11/report.csv'}
ROUND_TRIP = 0.03  # seconds, for the joins and the chord
TAIL = 0.3  # seconds, for one request in fifty of the second join

MOTO = """
import sys, urllib.request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer('127.0.0.1', port=0, verbose=False)
server.start()
endpoint = 'http://%s:%s' % server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(f'{endpoint}/results', method='PUT'))  # a bucket
print(endpoint, flush=True)
sys.stdin.read()  # until the benchmark ends
"""

COLD_START = """
import os, sys, time
import celery.backends.base, celery.result
app = celery.Celery(backend=sys.argv[1])
app.conf.update(s3_bucket='results', s3_backend_settings={'bucket': 'results'})
def read_memory():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
cpu, memory = time.process_time(), read_memory()
celery.result.AsyncResult('there', app=app).get()
print((time.process_time() - cpu) * 1e3, (read_memory() - memory) / 1e6)
"""


class Wire:
    """Takes the place of `URLLib3Session.send`, through which boto3 goes as well."""

    def __init__(self):
        self.counts = Counter()  # of requests, by method
        self.objects = None  # etags and contents, by URL; None: the server answers
        self.round_trip = self.tail = 0.0  # seconds
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        self.original = httpsession.URLLib3Session.send
        httpsession.URLLib3Session.send = lambda http, request: self.send(http, request)

    def count(self, call: Callable) -> Counter:
        self.counts.clear()
        call()
        return Counter(self.counts)

    def send(self, http, request):
        time.sleep(self.round_trip if next(self.numbers) % 50 else self.tail)
        with self.lock:
            self.counts[request.method] += 1
            if self.objects is None:
                return self.original(http, request)
            status, etag, content = self.answer(request.method, request.url, request)
        body = io.BytesIO(b'' if request.method == 'HEAD' else content)
        raw = HTTPResponse(body, {'etag': etag}, status, preload_content=False)
        return awsrequest.AWSResponse(request.url, status, raw.headers, raw)

    def answer(self, method: str, url: str, request) -> tuple[int, str, bytes]:
        """Do to the objects what AWS does: the status, the etag and the content."""
        etag, content = self.objects.get(url, ('', b''))
        if method == 'DELETE':
            self.objects.pop(url, None)
            return 204, '', b''
        if not etag and (method != 'PUT' or 'If-Match' in request.headers):
            return 404, '', b'<Error><Code>NoSuchKey</Code></Error>'
        if method != 'PUT':
            return 200, etag, content
        unwanted = etag and 'If-None-Match' in request.headers
        if unwanted or request.headers.get('If-Match', etag) != etag:
            return 412, '', b'<Error><Code>PreconditionFailed</Code></Error>'
        body = request.body if isinstance(request.body, bytes) else request.body.read()
        self.objects[url] = f'"{md5(body).hexdigest()}"', body
        return 200, self.objects[url][0], b''


def make_calls(app) -> dict:
    store = app.backend.store_result
    request = Context(id=os.urandom(16).hex())
    store('there', RESULT, 'SUCCESS')
    assert AsyncResult('there', app=app).get() == RESULT
    return {
        'get': lambda: AsyncResult('there', app=app).get(),
        'set': lambda: store(os.urandom(16).hex(), RESULT, 'SUCCESS'),
        'pending poll': lambda: AsyncResult('missing', app=app).state,
        'STARTED': lambda: store(request.id, {}, 'STARTED', request=request),
        'SUCCESS after it': lambda: store(request.id, RESULT, 'SUCCESS', request=request),
        'forget': lambda: AsyncResult(request.id, app=app).forget(),
    }


def make_sender(folder: str) -> Callable:
    http = httpsession.URLLib3Session(max_pool_connections=50)
    signer = auth.S3SigV4Auth(credentials.ReadOnlyCredentials('any', 'any', None), 's3', 'any')

    def send(method: str, task_id: str, body: bytes = b'') -> bytes:
        request = awsrequest.AWSRequest(method, folder + task_id, data=body)
        signer.add_auth(request)
        return http.send(request.prepare()).content

    return send


def make_group(app, wire: Wire, size: int) -> GroupResult:
    """A group whose results are in the dict, each task's its own id."""
    wire.objects = {}
    wire.round_trip = wire.tail = 0.0
    results = [AsyncResult(f'task-{number}', app=app) for number in range(size)]
    for result in results:
        app.backend.store_result(result.id, result.id, 'SUCCESS')
    return GroupResult('group', results, app=app)


def measure_cpu(calls: list, rounds: int) -> list[dict]:
    samples = {call: [] for call in calls}
    for _ in range(rounds):
        for call in calls:
            call()  # because the one before has filled the caches with its own
            began = time.process_time()
            call()
            samples[call].append((time.process_time() - began) * 1e6)
    return [{'µs': median(samples[call])} for call in calls]


def measure_cold_start(backend: str, rounds: int) -> list[dict]:
    runs = [check_output([sys.executable, '-c', COLD_START, backend]) for _ in range(rounds)]
    medians = [median(map(float, figures)) for figures in zip(*map(bytes.split, runs))]
    return [{unit: figure} for unit, figure in zip(['ms', 'MB'], medians)]


def count_waiting(app, wire: Wire, ends: list) -> Counter:
    """The requests until tasks are ready that end at these seconds of a clock that jumps."""
    group = make_group(app, wire, len(ends))
    later = list(zip(ends, wire.objects.items()))
    wire.objects = {}
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds
        wire.objects.update(item for end, item in later if end <= now)

    clock = Mock(monotonic=lambda: now, sleep=sleep)
    with patch('celery_s3.time', clock), patch('celery.backends.base.time', clock):
        return wire.count(group.get if len(ends) > 1 else group[0].get)


def measure_time(wire: Wire, tail: float, call: Callable) -> dict:
    wire.round_trip, wire.tail = ROUND_TRIP, tail
    began = time.perf_counter()
    call()
    return {'s': time.perf_counter() - began}


def measure_chord(app, wire: Wire, size: int) -> tuple[dict, dict]:
    """The time until a chord's body runs, on a new worker, and the requests of each part."""
    ended = threading.Event()

    @app.task(name='task', shared=False)
    def task(value, is_body=False):
        if is_body:
            ended.set()

    wire.round_trip = wire.tail = ROUND_TRIP
    wire.counts.clear()
    with start_worker(app, 16, 'threads', perform_ping_check=False, shutdown_timeout=60):
        began = time.perf_counter()
        celery.chord(task.s(number) for number in range(size))(task.s(is_body=True))
        assert ended.wait(180)
        seconds = time.perf_counter() - began
    return {'s': seconds}, {method: wire.counts[method] / size for method in wire.counts}


def print_row(what: str, *figures):  # dicts of amounts by unit, or None; the third is the floor
    cells = [' + '.join(f'{one[unit]:,.4g} {unit}' for unit in one or ()) for one in figures]
    ours, theirs = (sum((figure or {}).values()) for figure in figures[:2])
    cells.insert(2, f'{theirs / ours:.2f}' if theirs else '')
    print(f'| {what} | {" | ".join(cells)} |', flush=True)


def measure(endpoint: str, share: int):
    apps = [celery.Celery(broker='memory://', backend=backend) for backend in BACKENDS]
    for app in apps:
        app.conf.update(s3_bucket='results', s3_backend_settings={'bucket': 'results'})
        app.conf.broker_transport_options = {'polling_interval': 0.01}  # seconds
    ours, theirs = (make_calls(app) for app in apps)
    send = make_sender(f'{endpoint}/results/celery-task-meta-')
    value = send('GET', 'there')
    floor = {  # those of the calls that take one request, and nothing but the request
        'get': lambda: send('GET', 'there'),
        'set': lambda: send('PUT', os.urandom(16).hex(), value),
        'pending poll': lambda: send('GET', 'missing'),
    }
    for what in floor:
        calls = [ours[what], theirs[what], floor[what]]
        print_row(f'{what}, CPU', *measure_cpu(calls, 400 // share))
    starts = [measure_cold_start(backend, 10 // share) for backend in BACKENDS]
    for what, *figures in zip(['cold start and a get, CPU', 'the same, memory'], *starts):
        print_row(what, *figures)
    wire = Wire()
    for what in ours:
        print_row(f'{what}, requests', wire.count(ours[what]), wire.count(theirs[what]))
    waits = {'an hour for one task': [3600], 'ten minutes for a group of 1,000': [600] * 1000}
    for what, ends in waits.items():
        print_row(f'wait {what}', *[count_waiting(app, wire, ends) for app in apps])
    size = 1000 // share
    group, other, again = (make_group(app, wire, size) for app in (*apps, apps[0]))
    bare = partial(ThreadPoolExecutor(50).map, lambda result: send('GET', result.id), group)
    gets = [group.get, other.get, lambda: list(bare())]
    times = [measure_time(wire, ROUND_TRIP, get) for get in gets]
    print_row(f'join of {size:,}, 30 ms away', *times)
    times = measure_time(wire, TAIL, again.get), None, measure_time(wire, TAIL, gets[-1])
    print_row(f'join of {size:,}, one in 50 takes 300 ms', *times)
    times, counts = zip(*[measure_chord(app, wire, 300 // share) for app in apps])
    print_row(f'chord of {300 // share}, 16 threads, 30 ms away', *times)
    print_row('one part of it, requests', *counts)


if __name__ == '__main__':
    sys.path.insert(0, os.getcwd())
    with Popen([sys.executable, '-c', MOTO], stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as moto:
        endpoint = moto.stdout.readline().decode().strip()
        keys = dict.fromkeys(('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'), 'any')
        os.environ.update(keys, AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION='us-east-1')
        print('| | celery-s3 | built-in | ratio | floor |\n|---|--:|--:|--:|--:|')
        measure(endpoint, 5 if '--short' in sys.argv else 1)
    versions = [f'{name} {version(name)}' for name in ('celery', 'botocore', 'boto3', 'moto')]
    print(f'\nPython {sys.version.split()[0]}, {", ".join(versions)}')
