"""Measure celery-s3 beside Celery's built-in S3 backend (boto3), in one run, on one local server.

    python .ci/bench.py          # three to four minutes
    python .ci/bench.py --short  # under one: the same goals, fewer rounds, shorter groups

It needs celery, botocore and boto3, prints a Markdown table of medians with the ratios between
them, and exits with 1 when a goal is missed. It measures the `celery_s3.py` of this checkout.

The S3 server (in memory) and the proxy (a round trip of 30 ms) are processes of their own on
127.0.0.1, so none of their CPU counts; requests are counted by the server. The floor is what
signing one request with botocore and sending it with `URLLib3Session` costs, and nothing else.
"""

# Nothing that a backend would have to import itself: the cold starts would get it for free.
import asyncio
import contextlib
import gc
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY
from statistics import median
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote

ROOT = Path(__file__).resolve().parent.parent
OURS, THEIRS = 'celery-s3', 'built-in'
BUCKET, REGION, ACCESS_KEY, SECRET_KEY = 'results', 'us-east-1', 'testing', 'secret'
KEY = 'celery-task-meta-0d6f2f2c-5c1e-4f0e-9a53-3b0a7f4f3d11'
MISSING = 'celery-task-meta-57ad5a2b-7f4c-4b7e-8a4e-0c1f4f1d9e22'
VALUE = json.dumps(
    {'status': 'SUCCESS', 'result': {'rows': 1200, 'file': 'reports/2025/11/report.csv'}}
    | {'traceback': None, 'children': [], 'date_done': '2025-11-21T01:02:03.456789+00:00'}
    | {'task_id': KEY.removeprefix('celery-task-meta-')}
)
XML, DATE = '<?xml version="1.0" encoding="UTF-8"?>\n', 'Fri, 21 Nov 2025 01:02:03 GMT'
DELAY = 0.015  # seconds, each way
CONCURRENCY = 16  # threads of the worker that runs the chords
PATIENCE = 180  # seconds, for whatever is waited for


class Sizes(NamedTuple):
    rounds: int = 300  # of CALLS calls of each kind
    processes: int = 15
    join: int = 1000
    join_theirs: int = 50  # it reads them one after another, so each costs the same
    joins: int = 5
    chord: int = 300
    chords: int = 3


SHORT = Sizes(rounds=100, processes=9, join=200, join_theirs=20, joins=3, chord=60, chords=1)
CALLS = 5


class Store:
    """What S3 does with objects, in memory, and a count of requests by their kind."""

    def __init__(self):
        self.objects, self.counts, self.writes = {}, {}, 0

    def answer(self, method: str, target: str, headers: dict, body: bytes) -> tuple:
        """The status, the etag or None, and the content."""
        path, _, query = target.partition('?')
        if query == 'count':  # since it was last asked
            counts, self.counts = self.counts, {}
            return 200, None, json.dumps(counts).encode()
        key = unquote(path).lstrip('/').partition('/')[2]
        kind = 'LIST' if method == 'GET' and not key else method
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == 'LIST':
            return self.list(parse_qs(query))
        if kind == 'PUT':
            return self.put(key, body, headers)
        if kind == 'DELETE':
            self.objects.pop(key, None)
            return 204, None, b''
        return (200, *self.objects[key]) if key in self.objects else error(404, 'NoSuchKey')

    def put(self, key: str, body: bytes, headers: dict) -> tuple:
        found, expected = self.objects.get(key), headers.get('if-match', '').strip('"')
        if expected and not found:
            return error(404, 'NoSuchKey')
        if expected and expected != found[0] or found and 'if-none-match' in headers:
            return error(412, 'PreconditionFailed')
        self.writes += 1
        self.objects[key] = f'{self.writes:032x}', body
        return 200, self.objects[key][0], b''

    def list(self, query: dict) -> tuple:
        prefix, token = (query.get(name, [''])[0] for name in ('prefix', 'continuation-token'))
        after = unquote(token)
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        parts = [
            f'<Contents><Key>{quote(key)}</Key><LastModified>2025-11-21T00:00:00.000Z'
            f'</LastModified><ETag>"{self.objects[key][0]}"</ETag></Contents>'
            for key in keys[:1000]
        ]
        if keys[1000:]:
            parts.append(f'<NextContinuationToken>{quote(keys[999])}</NextContinuationToken>')
        content = f'{XML}<ListBucketResult>{"".join(parts)}</ListBucketResult>'
        return 200, None, content.encode()

    async def connected(self, reader, writer):
        """Answer one connection's requests, one after another."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').split('\r\n')
                method, target, _ = head[0].split(' ')
                pairs = (line.split(': ', 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                if 'expect' in headers:
                    writer.write(b'HTTP/1.1 100 Continue\r\n\r\n')
                body = await reader.readexactly(int(headers.get('content-length', 0)))
                status, etag, content = self.answer(method, target, headers, body)
                lines = [f'HTTP/1.1 {status} .', 'Server: AmazonS3', f'Date: {DATE}']
                lines += ['x-amz-request-id: 1', 'x-amz-id-2: 1', 'Content-Type: text/plain']
                if etag:
                    lines += [f'ETag: "{etag}"', f'Last-Modified: {DATE}']
                if status != 204:
                    lines.append(f'Content-Length: {len(content)}')
                head = '\r\n'.join([*lines, '', '']).encode()
                writer.write(head if method == 'HEAD' else head + content)


def error(status: int, code: str) -> tuple:
    content = f'{XML}<Error><Code>{code}</Code><Message>No.</Message></Error>'
    return status, None, content.encode()


def serve(port: str = ''):
    """Be the server, or the proxy for the server's port, until standard input is closed."""

    async def pipe(reader, writer):
        later = asyncio.get_running_loop().call_later
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65536):
                later(DELAY, writer.write, chunk)
        later(DELAY, writer.close)

    async def connected(reader, writer):
        there = await asyncio.open_connection('127.0.0.1', int(port))
        await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    async def main():
        handler = connected if port else Store().connected
        server = await asyncio.start_server(handler, '127.0.0.1', 0, backlog=200)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        os._exit(0)  # with the connections still open

    asyncio.run(main())


def counted(port: int) -> dict:
    """How many requests of each kind the server has seen since this was last asked."""
    from urllib.request import urlopen

    with urlopen(f'http://127.0.0.1:{port}/?count', timeout=PATIENCE) as answer:
        return json.load(answer)


def make_app(name: str, port: int):
    """A Celery application whose results one of the two backends keeps behind that port."""
    from celery import Celery

    settings = {'bucket': BUCKET, 'base_path': f'{name}/', 'aws_region': REGION}
    settings |= {'aws_access_key_id': ACCESS_KEY, 'aws_secret_access_key': SECRET_KEY}
    settings |= {'endpoint_url': f'http://127.0.0.1:{port}'}
    url = 'celery_s3.S3Backend' if name == OURS else 's3://'
    app = Celery('bench', broker='memory://', backend=url)
    app.conf.broker_transport_options = {'polling_interval': 0.01}
    if name == OURS:
        app.conf.CELERY_S3_BACKEND_SETTINGS = settings
    else:  # s3_bucket, s3_access_key_id and so on
        app.conf.update({f's3_{key.removeprefix("aws_")}': settings[key] for key in settings})
    return app


def make_floor(port: int):
    """A function that signs a GET of a key, sends it and reads the answer, and nothing else."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials
    from botocore.httpsession import URLLib3Session

    http = URLLib3Session(socket_options=[(IPPROTO_TCP, TCP_NODELAY, 1)])
    credentials = Credentials(ACCESS_KEY, SECRET_KEY).get_frozen_credentials()
    folder = f'http://127.0.0.1:{port}/{BUCKET}/{OURS}/'

    def get(key: str) -> bytes:
        request = AWSRequest('GET', folder + key)
        S3SigV4Auth(credentials, 's3', REGION).add_auth(request)
        return http.send(request.prepare()).content

    return get


def expect(found, wanted):
    if (found.decode() if isinstance(found, bytes) else found) != wanted:
        raise SystemExit(f'a wrong answer: {found!r} instead of {wanted!r}')


def cpu_per_call(port: int, sizes: Sizes) -> dict:
    """The median CPU seconds of a call, by what and by whom, in interleaved rounds."""
    floor, calls = make_floor(port), {}
    calls['get', 'floor'] = lambda: expect(floor(KEY), VALUE)
    calls['poll', 'floor'] = lambda: expect(b'NoSuchKey' in floor(MISSING), True)
    for name in OURS, THEIRS:
        backend = make_app(name, port).backend
        backend.set(KEY, VALUE)
        calls['set', name] = lambda to=backend: to.set(KEY, VALUE)
        calls['get', name] = lambda to=backend: expect(to.get(KEY), VALUE)
        calls['poll', name] = lambda to=backend: expect(to.get(MISSING), None)
    samples, order = {call: [] for call in calls}, list(calls.items())
    gc.collect()
    gc.freeze()  # a collection that falls into one call should not walk what another has loaded
    for _ in range(sizes.rounds):
        random.shuffle(order)  # so that nobody always follows the same
        order.sort(key=lambda item: THEIRS in item[0])  # and the floor is near what it is for
        for call, function in order:
            function()
            before = time.process_time()
            for _ in range(CALLS):
                function()
            samples[call].append((time.process_time() - before) / CALLS)
    found = {'get': {}, 'set': {}, 'poll': {}}
    for (what, name), sample in samples.items():
        found[what][name] = median(sample)
    return found


def requests_per_operation(name: str, port: int) -> dict:
    """The requests that the server sees, by kind, for each of Celery's operations."""
    backend = make_app(name, port).backend
    backend.store_result('first', 42, 'SUCCESS')  # a process may look at its store once
    operations = {
        'pending poll': lambda: expect(backend.get_task_meta('stored')['status'], 'PENDING'),
        'store': lambda: backend.store_result('stored', 42, 'SUCCESS'),
        'fetch': lambda: expect(backend.get_task_meta('stored')['result'], 42),
        'forget': lambda: backend.forget('stored'),
    }
    counts = {}
    for operation, call in operations.items():
        counted(port)
        call()
        counts[operation] = counted(port)
    backend.store_result('started', {}, 'STARTED')
    backend.store_result('started', 42, 'SUCCESS')
    return counts | {'STARTED, then SUCCESS': counted(port)}


def join_seconds(name: str, port: int, proxy: int, count: int, joins: int) -> float:
    """The median wall seconds per result of joining a group behind the proxy."""
    from celery.result import AsyncResult, GroupResult

    direct, app = make_app(name, port), make_app(name, proxy)
    ids, seconds = [f'join-{n}' for n in range(count)], []
    for n, task_id in enumerate(ids):
        direct.backend.store_result(task_id, n, 'SUCCESS')
    expect(app.backend.get(MISSING), None)
    for _ in range(joins):
        group = GroupResult('join', [AsyncResult(task_id, app=app) for task_id in ids], app=app)
        started = time.perf_counter()
        values = group.get(timeout=PATIENCE)
        seconds.append((time.perf_counter() - started) / count)
        expect(values, list(range(count)))
    return median(seconds)


def cold_start(name: str, port: str):
    """Print what the first answer costs with Celery imported, then what it costs new threads."""
    import celery.backends.base
    import celery.result  # noqa: F401

    app, threads = make_app(name, int(port)), []
    app.conf.result_expires  # noqa: B018 (reads the configuration)

    def resident() -> int:
        pages = Path('/proc/self/statm').read_text().split()[1]
        return int(pages) * os.sysconf('SC_PAGE_SIZE')

    def use():
        started = time.thread_time()
        app.backend.get(KEY)
        threads.append(time.thread_time() - started)

    memory, cpu = resident(), time.process_time()
    value = app.backend.get(KEY)
    cpu, memory = time.process_time() - cpu, resident() - memory
    expect(value, VALUE)
    for _ in range(3):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(PATIENCE)
    print(json.dumps({'cpu': cpu, 'memory': memory, 'thread': median(threads)}))


def run_chord(name: str, port: str, proxy: str, parts: str):
    """Print the seconds of a chord behind the proxy, and its requests for each part."""
    import celery
    from celery.contrib.testing.worker import start_worker

    app, done = make_app(name, int(proxy)), threading.Event()
    warm, total, size = threading.Barrier(CONCURRENCY + 1), 0, int(parts)

    @app.task(name='warm_up', ignore_result=True)
    def warm_up():
        app.backend.get(MISSING)  # the built-in makes a backend for each thread
        warm.wait(PATIENCE)

    @app.task(name='part')
    def part(n):
        return n

    @app.task(name='body', ignore_result=True)  # so that none of its requests count
    def body(values):
        if sorted(values) == list(range(size)):
            done.set()

    worker = {'pool': 'threads', 'concurrency': CONCURRENCY, 'loglevel': 'ERROR'}
    with start_worker(app, perform_ping_check=False, shutdown_timeout=PATIENCE, **worker):
        for _ in range(CONCURRENCY):
            warm_up.apply_async()
        warm.wait(PATIENCE)
        app.backend.store_result('first', 42, 'SUCCESS')
        counted(int(port))
        started = time.perf_counter()
        celery.chord(part.s(n) for n in range(size))(body.s())
        if not done.wait(PATIENCE):
            raise SystemExit(f'the chord with {name} did not finish')
        seconds = time.perf_counter() - started
        for _ in range(PATIENCE):  # what is cleaned up behind the body counts as well
            seen = sum(counted(int(port)).values())
            total += seen
            if not seen:
                break
            time.sleep(0.5)
    print(json.dumps({'seconds': seconds, 'requests': total / size}))


def medians(rounds: int, *arguments) -> dict:
    """The medians of what processes print that run in turns, by what and by whom."""
    found = {OURS: [], THEIRS: []}
    for _ in range(rounds):
        for name, answers in found.items():
            command = [sys.executable, __file__, arguments[0], name, *map(str, arguments[1:])]
            ran = subprocess.run(command, stdout=subprocess.PIPE, timeout=2 * PATIENCE, check=True)
            answers.append(json.loads(ran.stdout))
    return {
        what: {name: median([answer[what] for answer in found[name]]) for name in found}
        for what in found[OURS][0]
    }


class Row(NamedTuple):
    what: str
    ours: str
    theirs: str
    ratio: str = ''
    goal: str = ''
    missed: bool = False


def less(what: str, found: dict, unit: str, goal: float = 0, aim: str = '') -> Row:
    """A row in which the built-in must need at least `goal` times as much."""
    ratio = found[THEIRS] / found[OURS]
    cells = shown(found[OURS], unit), shown(found[THEIRS], unit), f'{ratio:.1f} times less'
    return Row(what, *cells, f'≥ {goal}{aim}' if goal else '', ratio < goal)


def over_floor(what: str, found: dict, goal: float) -> Row:
    """A row in which celery-s3 may need at most `goal` times the floor."""
    ratio = found[OURS] / found['floor']
    cells = shown(found[OURS], 'µs'), f'floor: {shown(found["floor"], "µs")}', f'{ratio:.2f} times'
    return Row(f'{what}, over the floor', *cells, f'≤ {goal}', ratio > goal)


def shown(value: float, unit: str) -> str:
    scaled = value * {'µs': 1e6, 'ms': 1e3, 's': 1, 'MB': 1e-6}[unit]
    return f'{scaled:,.0f} {unit}' if scaled >= 100 else f'{scaled:.3g} {unit}'


def kinds(counts: dict) -> str:
    return ' + '.join(f'{number} {kind}' for kind, number in sorted(counts.items()))


def measure(port: int, proxy: int, sizes: Sizes) -> list[Row]:
    cpu = cpu_per_call(port, sizes)
    rows = [
        less('CPU per get', cpu['get'], 'µs', 5),
        over_floor('CPU per get', cpu['get'], 1.25),
        less('CPU per set', cpu['set'], 'µs', 3),
        less('CPU per pending poll', cpu['poll'], 'µs'),
        over_floor('CPU per pending poll', cpu['poll'], 1.4),
    ]
    requests, theirs = (requests_per_operation(name, port) for name in (OURS, THEIRS))
    for what, counts in requests.items():
        rows.append(Row(f'Requests per {what}', kinds(counts), kinds(theirs[what])))
    starts = medians(sizes.processes, 'cold_start', port)
    joins = {
        OURS: join_seconds(OURS, port, proxy, sizes.join, sizes.joins),
        THEIRS: join_seconds(THEIRS, port, proxy, sizes.join_theirs, sizes.joins),
    }
    chords = medians(sizes.chords, 'run_chord', port, proxy, sizes.chord)
    parts = (f'{number:.2f}' for number in chords['requests'].values())
    return [
        *rows,
        Row(f'Requests per part of a chord of {sizes.chord}', *parts),
        less('Cold start, CPU', starts['cpu'], 'ms', 2, ', aim 3'),
        less('Cold start, memory', starts['memory'], 'MB', 2, ', aim 3'),
        less('First use from another thread, CPU', starts['thread'], 'ms', 10),
        less(f'Join of {sizes.join:,} results 30 ms away, each', joins, 'ms', 30),
        less(f'Chord of {sizes.chord} parts 30 ms away', chords['seconds'], 's', 5),
    ]


def clean_environment():
    """Nothing from outside may point the backends elsewhere or slow one of them down."""
    for name in list(os.environ):
        if name.upper().startswith(('AWS_', 'BOTO')) or name.upper().endswith('_PROXY'):
            del os.environ[name]
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # a cold start is not a compilation
    os.environ['AWS_CONFIG_FILE'] = os.environ['AWS_SHARED_CREDENTIALS_FILE'] = os.devnull
    os.environ['AWS_EC2_METADATA_DISABLED'] = 'true'


@contextlib.contextmanager
def started(*arguments):
    """The port of a server or proxy in a process that ends with this one."""
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    command = [sys.executable, __file__, 'serve', *map(str, arguments)]
    with subprocess.Popen(command, **pipes) as process:
        yield int(process.stdout.readline())


def main(short: bool) -> int:
    clean_environment()
    sizes = SHORT if short else Sizes()
    with started() as port, started(port) as proxy:
        rows = measure(port, proxy, sizes)
    print("| | celery-s3 | Celery's built-in | | goal |\n|---|---:|---:|---:|---:|")
    for row in rows:
        print(f'| {" | ".join(row[:5])} |')
    versions = ', '.join(f'{name} {version(name)}' for name in ('celery', 'botocore', 'boto3'))
    command = f'python .ci/bench.py{" --short" if short else ""}'
    print(f'\nMedians of `{command}` with {versions}, Python {platform.python_version()}.')
    print(f'The built-in joined {sizes.join_theirs} results. ', end='')
    print(f'The chords ran in a worker with {CONCURRENCY} threads.')
    for row in rows:
        if row.missed:
            print(f'missed: {row.what}: {row.ratio}, goal {row.goal}', file=sys.stderr)
    return int(any(row.missed for row in rows))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    processes = {'serve': serve, 'cold_start': cold_start, 'run_chord': run_chord}
    if sys.argv[1:2] and sys.argv[1] in processes:
        processes[sys.argv[1]](*sys.argv[2:])
    elif sys.argv[1:] in ([], ['--short']):
        sys.exit(main('--short' in sys.argv))
    else:
        sys.exit(__doc__)
