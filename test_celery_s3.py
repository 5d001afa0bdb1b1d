"""The rules of celery_s3, each on the wire: what is sent, and what comes back. The last section
can run on a real bucket: CELERY_S3_TEST_URL='s3://bucket/prefix?endpoint_url=...'."""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import celery.exceptions
import pytest
import requests
import responses
from botocore import auth, awsrequest, credentials, exceptions, handlers, httpsession, session
from botocore.exceptions import ClientError
from botocore.retries import standard
from celery import Celery, chord, group
from celery.backends.base import Context, KeyValueStoreBackend
from celery.contrib.testing.worker import start_worker
from celery.exceptions import BackendStoreError, Ignore, ImproperlyConfigured, NotRegistered
from celery.result import AsyncResult, EagerResult, GroupResult
from kombu.transport import memory
from kombu.utils.encoding import bytes_to_str

import celery_s3.backends
from celery_s3 import Bucket, Note, S3Backend, Settings, claim

LIVE_URL = os.environ.get('CELERY_S3_TEST_URL')
DROPPED = ConnectionResetError(104, 'Connection reset by peer')
REFUSED = ConnectionRefusedError(111, 'Connection refused')
Sent = type('Sent', (str,), {})  # a request, as 'METHOD key', with its url, headers and body
TASK, GROUP, CHORD = 'celery-task-meta-', 'celery-taskset-meta-', 'chord-unlock-'
ROOMS = [celery_s3.S3ChordBackend, celery_s3.S3WaitingBackend, celery_s3.S3StoringBackend]
AWS, OWN = 'https://results.s3.us-east-1.amazonaws.com/', 'https://mine:3/s3/'
SIGNS = [None, 'the record goes', 'STARTED', 'FAILURE', 'FAILURE twice', 'RETRY']
STATES = ['STARTED', 'PROGRESS', 'RETRY', 'FAILURE', 'REVOKED', 'SUCCESS']
ZONE, LOCAL = '--use1-az4--x-s3', '--usw2-lax1-az1--x-s3'
FIPS, DUAL = {'USE_FIPS_ENDPOINT': 'true'}, {'USE_DUALSTACK_ENDPOINT': 'true'}
ANY = {'ENDPOINT_URL': 'http://any:1'}
REGION = {'x-amz-bucket-region': 'eu'}
ERROR = '<?xml version="1.0"?><Error><Code>Internal</Code></Error>'
LATE = {'exc_type': 'ValueError', 'exc_message': 'late', 'exc_module': 'builtins'}
SECRET, TOKEN = 'never/shown/ANYWHERE', 'AQoDYXdzEXAMPLETOKEN'
KEYS = {'aws_access_key_id': 'AKID', 'aws_secret_access_key': SECRET, 'aws_session_token': TOKEN}
EMPTY_SEGMENTS = ['a//b', '/lead', 'trail/']  # SeaweedFS and MinIO do not keep these
ODD_IDS = [
    *EMPTY_SEGMENTS, 'a b', 'a+b', '100%', 'a%2Fb', 'a?acl', 'a#b', 'a&b=c', '"quoted"', "it's",
    '<tag>', 'é', '☃', '𝄞', 'back\\slash', '~', 'a;b,c:d@e!f$g*h(i)', '...', 'a..b', '.x',
]  # fmt: skip
# Some stores and proxies resolve dot segments, or refuse control characters. S3 does neither.
ODDER_IDS = ['a/../b', '..', '../x', './x', 'x/.', 'a\nb', '\0', '\x1f', '\x7f', '\r\n', 42, 4.5]
ODDER_IDS += [uuid.UUID(int=7), b'bytes', ('a', 1)]
REPEATED = f'<Error><CanonicalRequest>x-amz-security-token:{TOKEN}</CanonicalRequest></Error>'


# S3 on `responses`


def refusal(status, code, headers=None, message='No.'):
    body = f'<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return status, {'x-amz-request-id': 'R1', **(headers or {})}, body


def lost(answer):
    answer()
    raise ConnectionResetError(*DROPPED.args)


class Store:  # the bucket `results` in memory, which answers as S3 does
    def __init__(self):
        self.objects, self.faults, self.sent, self.made, self.sessions = {}, [], [], [], []
        self.etag_forms, self.gate, self.lock = ('quoted', 'bare'), None, threading.RLock()
        self.ignores_conditions = False

    def fail_next(self, pattern, fault, times=1):
        """The next requests whose 'METHOD key' begins like the pattern meet a fault: an answer, an
        error, or a function, which is given one that answers as S3 does."""
        self.faults += [(pattern, fault)] * times

    def take_requests(self):
        taken, self.sent = self.sent, []
        return taken

    def __call__(self, request):
        url = urlsplit(request.url)
        bucket, _, host = url.hostname.partition('.')
        key = unquote(url.path[1:])
        if not host.startswith('s3'):  # path style
            bucket, _, key = key.partition('/')
        sent = Sent(f'{request.method} {key}')
        sent.url, sent.headers, sent.body = request.url, request.headers, request.body or b''
        if self.gate:
            self.gate(sent)
        answer = functools.partial(self.answer, bucket, key, request.method, url.path, sent)
        with self.lock:
            self.sent.append(sent)
            found = next((one for one in self.faults if re.match(one[0], sent)), None)
            if not found:
                return answer()
            self.faults.remove(found)
        if isinstance(found[1], Exception):
            raise type(found[1])(*found[1].args)
        return found[1](answer) if callable(found[1]) else found[1]

    def answer(self, bucket, key, method, path, sent):
        if path != quote(unquote(path), '/-._~'):  # S3 signs what it would have encoded
            return refusal(403, 'SignatureDoesNotMatch')
        if bucket != 'results':
            return refusal(404, 'NoSuchBucket')
        with self.lock:
            if method == 'PUT':
                return self.put(key, sent.body, {} if self.ignores_conditions else sent.headers)
            if method == 'DELETE':
                self.objects.pop(key, None)
                return 204, {}, ''
            if key in self.objects:
                return 200, {'ETag': f'"{self.etag(key)}"'}, self.objects[key]
            return refusal(404, 'NoSuchKey')

    def put(self, key, body, headers):
        match = headers.get('If-Match')
        if match is not None:
            form = 'quoted' if match[:1] == '"' else 'bare'
            if self.etag_forms == ('quoted',) and form == 'bare':  # Cloudflare R2
                return refusal(400, 'InvalidArgument')
            if key not in self.objects:
                return refusal(404, 'NoSuchKey')
            if form not in self.etag_forms or match.strip('"') != self.etag(key):
                return refusal(412, 'PreconditionFailed')
        if 'If-None-Match' in headers and key in self.objects:
            return refusal(412, 'PreconditionFailed')
        self.objects[key] = body
        return 200, {'ETag': f'"{self.etag(key)}"'}, ''

    def etag(self, key):
        return hashlib.md5(self.objects[key]).hexdigest()

    def finish(self, task_id, result=None, status='SUCCESS'):  # what a worker elsewhere stores
        meta = {'status': status, 'result': result, 'task_id': task_id, 'children': []}
        self.objects[f'{TASK}{task_id}'] = json.dumps(meta).encode()

    def left_behind(self, *task_ids):
        return set(self.objects) - {f'{TASK}{task_id}' for task_id in task_ids}

    def find_record(self, note):
        return GROUP + Note.decode(self.objects[note]).record

    def rewrite(self, key, **changed):  # what another delivery, of a later edition, makes of it
        changed = {**json.loads(self.objects[key]), **changed, 'nonce': 'another', 'later': 'any'}
        self.objects[key] = json.dumps(changed).encode()


class Clock:  # stands in for the module `time`: sleeping is free, and lets things happen
    def __init__(self):
        self.now, self.slept, self.events = 0.0, [], []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        self.act()

    def at(self, when, action, *args):
        self.events.append((when, lambda: action(*args)))
        self.events.sort(key=lambda event: event[0])
        self.act()

    def act(self):
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()


@pytest.fixture(autouse=True)
def clock(request, monkeypatch, tmp_path, caplog):
    """Nothing outside plays a part: settings, chance, time (but for a worker), or other tests."""
    if LIVE_URL and 'live' in request.fixturenames:
        yield
        return
    for name in os.environ:
        if name.startswith('AWS_') or name.lower().endswith('_proxy') or 'CA_BUNDLE' in name:
            monkeypatch.delenv(name)
    for name in 'config_file', 'shared_credentials_file':
        monkeypatch.setenv(f'AWS_{name.upper()}', str(tmp_path / name))
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'AKIAIOSFODNN7EXAMPLE')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY')
    monkeypatch.setattr(random, 'uniform', lambda low, high: high)
    monkeypatch.setattr(random, 'shuffle', lambda ids: None)
    caplog.set_level(logging.DEBUG, 'celery_s3')
    clock, pools = Clock(), []
    make = lambda size: pools.append(ThreadPoolExecutor(size)) or pools[-1]  # noqa: E731
    monkeypatch.setattr(celery_s3, 'ThreadPoolExecutor', make)
    monkeypatch.setattr(celery_s3, 'time', clock)
    for name in {'live', 'store'} & {*request.fixturenames}:
        request.getfixturevalue(name)
    yield clock
    for pool in pools:  # as the store is still there, no request is under way after this test
        pool.shutdown()


@pytest.fixture
def store(monkeypatch):  # `responses` sees what URLLib3Session sends, and the stub answers
    store, make = Store(), httpsession.URLLib3Session.__init__

    def init(http, *args, **kwargs):
        if 'socket_options' in kwargs:  # botocore makes others to look up credentials
            store.made.append(kwargs)
        make(http, *args, **kwargs)

    def send(http, request):
        store.sessions.append(http)
        headers = {name: bytes_to_str(value) for name, value in request.headers.items()}
        sent = requests.Request(request.method, request.url, headers, data=request.body).prepare()
        sent.url = request.url  # which prepare() rids of dot segments
        try:
            answer = requests.adapters.HTTPAdapter().send(sent, stream=True)
        except ConnectionRefusedError as error:  # these are raised as botocore raises them
            known = {'endpoint_url': request.url, 'error': error}
            raise exceptions.EndpointConnectionError(**known) from error
        except OSError as error:
            known = {'endpoint_url': request.url, 'error': error, 'request': request}
            raise exceptions.ConnectionClosedError(**known) from error
        except Exception as error:
            raise exceptions.HTTPClientError(error=error) from error
        answer.raw.enforce_content_length = False  # nor does URLLib3Session
        response = awsrequest.AWSResponse(request.url, answer.status_code, answer.headers, None)
        response._content = answer.raw.read()
        return response

    monkeypatch.setattr(httpsession.URLLib3Session, '__init__', init)
    monkeypatch.setattr(httpsession.URLLib3Session, 'send', send)
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        for method in 'GET', 'PUT', 'DELETE':
            mock.add_callback(method, re.compile('https?://'), callback=store)
        yield store


def show(caught, log):  # all that error trackers may send of an error and what hangs on it
    shown, rest = [log.text], [(caught.value, caught.tb.tb_next)]
    while rest:
        error, frames = rest.pop()
        lines = traceback.TracebackException(type(error), error, frames, capture_locals=True)
        shown += [*lines.format(chain=False), repr(vars(error))]
        hanging = [one for one in (error.__cause__, error.__context__) if one is not None]
        rest += [(one, one.__traceback__) for one in hanging]
    return ''.join(shown)


def make_bucket(**settings):
    return Bucket(Settings.from_dict({'bucket': 'results', **settings}))


@pytest.fixture
def started(monkeypatch):  # the threads that were, of which `limit` can be
    def start_some(thread):
        if len(started) == started.limit:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    start, started = threading.Thread.start, type('Started', (list,), {'limit': 99})()
    monkeypatch.setattr(threading.Thread, 'start', start_some)
    return started


class App(Celery):
    def results_of(self, *task_ids):
        return self.GroupResult('g', [self.AsyncResult(task_id) for task_id in task_ids])

    def begin(self, *ids):
        """Applies a chord of parts with these ids: their requests, its result, its id."""
        add, total = self.tasks['add'], self.tasks['total']
        header = [add.s(number).set(task_id=task_id) for number, task_id in enumerate(ids)]
        result = chord(header, app=self)(total.s())
        parts = [request for name, _, request in self.take_messages() if name == 'add']
        return parts, result, f'{result.parent.id}.{ids[-1]}'

    def finish(self, part, value=1):
        self.backend.mark_as_done(part.id, value, part)

    def take_messages(self):
        """Takes the messages off the queue: (task, args, the request as the worker sees it)."""
        with self.connection_for_read() as connection:
            queue = connection.SimpleQueue('celery', no_ack=True)
            messages = [queue.get(block=False) for _ in range(queue.qsize())]
        taken = [(one.headers, *one.payload) for one in messages]
        return [
            (headers['task'], args, Context(headers, **embed)) for headers, args, _, embed in taken
        ]

    def take_bodies(self):
        return [args for name, args, _ in self.take_messages() if name == 'total']

    def fetch(self, signature):
        result = signature.apply_async()
        return result.get(timeout=60, interval=0.01, disable_sync_subtasks=False)


def make_app(settings=None, backend='S3Backend', **conf):
    def add(*numbers):
        return sum(numbers)

    def fail(*_):
        raise ValueError('boom')

    def total(results):
        return sum(total(one) if isinstance(one, list) else one for one in results)

    def retried(task, number):
        if not task.request.retries:
            raise task.retry(countdown=0)
        return number

    def replaced(task, name):
        raise task.replace(group(app.tasks['add'].s(1), app.tasks[name].s(2), app=app))

    memory.Channel.queues.clear()
    app = App('tests', broker='memory://', set_as_current=False)
    app.conf.update(
        result_backend=f'celery_s3.{backend}',
        CELERY_S3_BACKEND_SETTINGS={'bucket': 'results'} if settings is None else settings,
        broker_connection_retry_on_startup=True,
        broker_transport_options={'polling_interval': 0.005},
        worker_hijack_root_logger=False,
        **conf,
    )
    app.task(name='ignored', shared=False, ignore_result=True)(add)
    for run in add, fail, total, retried, replaced:
        app.task(name=run.__name__, shared=False, bind=run in (retried, replaced))(run)
    return app


@contextlib.contextmanager
def working(app, **pool):  # a worker that ends within 2 * 0.05 seconds, not two times two
    drain = memory.Transport.drain_events
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Transport, 'drain_events', lambda *args, **_: drain(*args, 0.05))
        patch.setattr(celery_s3, 'time', time)
        with start_worker(app, shutdown_timeout=60, perform_ping_check=False, **pool):
            yield app


@pytest.fixture
def app():
    return make_app()


# Settings


@pytest.mark.parametrize(('name', 'namespace', 'backend'), [
    ('s3_backend_settings', None, 'result_backend'), ('MY_S3_BACKEND_SETTINGS', 'MY',
    'MY_RESULT_BACKEND'), ('CELERY_S3_BACKEND_SETTINGS', None, 'CELERY_RESULT_BACKEND'),
    ('CELERY_S3_BACKEND_SETTINGS', 'CELERY', 'CELERY_RESULT_BACKEND'),
])  # fmt: skip
@pytest.mark.parametrize('unset', [None, ''])
def test_settings_are_found_and_named_as_they_are_written(name, namespace, backend, unset):
    def configure(settings):
        app, conf = Celery(set_as_current=False), {backend: 'celery_s3.backends.S3Backend'}
        app.config_from_object({**conf, name: settings}, namespace=namespace)
        return app.backend

    given = {**dict.fromkeys(vars(Settings()), unset), 'bucket': 'results', 'base_path': '/in/'}
    del given['unknown']
    made = configure(given)
    assert type(made) is S3Backend  # by the name that it had in celery-s3 1.x
    assert made.as_uri() == made.as_uri(True) == 's3://results/in/'
    found, told = made.bucket.settings, Settings(bucket='results', base_path='/in/')
    assert {**vars(told), 'aws_region': 'us-east-1'} == vars(found)
    assert (found.max_connections, found.headers, found.conditional_writes) == (50, {}, True)
    pytest.raises(ImproperlyConfigured, configure, {}).match(f'^{name}: bucket must be a name')
    pytest.raises(ImproperlyConfigured, configure, ['bucket']).match(f'^{name} must be a dict$')


WRONG = {
    'bucket': [*'b/ s3://b arn:aws:s3:::b b#x b?x=y b%2f . .. é'.split(), '', None, 1, ' b', 'b\n',
        'b' * 256, *'a--x-s3 b--xa-s3 b--table-s3 b--op-s3 b--use1--x-s3'.split(), f'a.b{ZONE}',
        f'B{ZONE}', f'-b{ZONE}', ZONE, 'b' * 48 + ZONE],
    'base_path': [1, '.', './x', 'a/../x/', '/..', 'a\n', '\0', '\x7f'],
    'aws_region': [1, SECRET, 'us-east-1 ', 'us-east-1\n', 'a.b', 'a/b', 'é', 'r' * 64],
    'aws_access_key_id': [1, ' A', 'A\n', 'é', ''], 'aws_session_token': [1, f'{TOKEN} ', 'T\r'],
    'aws_secret_access_key': [1, ' S', f'{SECRET}\n', f'{SECRET}\nx', [SECRET]],
    'endpoint_url': [*'localhost:9000 ftp://h http:// http://h/?x=y http://h?x'.split(),
        f'http://a:{TOKEN}@h', 1, 'http://h/#f', 'http://h /', 'http://h\n', 'http://h:',
        'http://h:x', 'http://é'],
    'headers': ['x-amz-acl', ['x-amz-acl'], {'x-a': True}, {'x-é': ''}, {'x-a\n': ''}, {5: ''},
        *({name: ''} for name in ('a: b', 'a b', 'a(b)', '')), *({'x-a': one} for one in
        (f'{SECRET}\nb', 'é', ' a'))],
    'conditional_writes': ['False', 0], 'denied_is_missing': ['True', 1],
    'max_connections': ['7', True, False, 0, -1, 1.5],
}  # fmt: skip
WRONG_CASES = [
    ({}, {}, 'bucket must be'),
    ({'bucket': 'b', 'buckt': SECRET}, {}, "unknown setting 'buckt'; known are bucket, "),
    ({'bucket': 'b', 'region': None}, {}, "unknown setting 'region'; known are bucket, base_path"),
    ({'bucket': 'b', 5: 'x'}, {}, 'unknown setting 5; known are .*, max_connections$'),
    ({'bucket': 'b', 'aws_secret_access_key': SECRET}, {}, 'aws_secret_access_key go together'),
    ({'bucket': 'b', 'aws_session_token': TOKEN}, {}, 'aws_access_key_id and'),
    ({'bucket': 'b', **KEYS, 'aws_profile': 'absent'}, {}, 'aws_profile or AWS_PROFILE: The'),
    ({'bucket': 'b'}, {'AWS_PROFILE': 'absent'}, 'AWS_PROFILE: .*absent'),
    ({'bucket': 'b'}, {'AWS_SHARED_CREDENTIALS_FILE': __file__}, 'Unable to parse'),  # its SECRET
    ({'bucket': 'b'}, {'AWS_DEFAULT_REGION': 'us-east-1\n'}, 'aws_region must be'),
    ({'bucket': 'b'}, {'AWS_ENDPOINT_URL': 'http://h/?tenant=x'}, 'endpoint_url must be'),
    *[({'bucket': 'b', **KEYS, one: bad}, {}, f'{one} ') for one in WRONG for bad in WRONG[one]],
]  # fmt: skip


@pytest.mark.parametrize(('settings', 'variables', 'problem'), WRONG_CASES)
def test_a_wrong_setting_is_named(store, monkeypatch, caplog, settings, variables, problem):
    for name in variables:
        monkeypatch.setenv(name, variables[name])
    app, direct = make_app(settings), Settings.from_dict(settings)
    error = pytest.raises(ImproperlyConfigured, lambda: app.backend)
    error.match(f'^CELERY_S3_BACKEND_SETTINGS: .*{problem}')
    shown = show(error, caplog) + show(pytest.raises(ValueError, Bucket, direct), caplog)
    assert not store.sent and not re.search(f'{SECRET}|{TOKEN}|EXAMPLEKEY', shown)


# The bucket


def test_exactly_transient_faults_are_safe_to_retry():
    def answered(status, code='Any'):
        answer = {'Error': {'Code': code}, 'ResponseMetadata': {'HTTPStatusCode': status}}
        return ClientError(answer, 'GET')

    def make(name):
        words = 'endpoint_url error proxy_url provider error_msg cred_var'.split()
        return getattr(exceptions, f'{name}Error')(**dict.fromkeys(words, 'x'))

    names = 'ConnectionClosed ConnectTimeout EndpointConnection ProxyConnection ReadTimeout SSL'
    names += ' NoCredentials CredentialRetrieval MetadataRetrieval'
    statuses = 408, 409, 429, 499, 500, 502, 503, 504, 507, 509, 520, 530  # 409: Ceph 20
    codes = 'BadDigest XAmzContentSHA256Mismatch RequestTimeTooSkewed InvalidIdentityToken'.split()
    codes += ['IDPCommunicationError', *standard.ThrottledRetryableChecker._THROTTLED_ERROR_CODES]
    codes += standard.TransientRetryableChecker._TRANSIENT_ERROR_CODES  # all that boto3 retries
    transient = [*map(make, names.split()), *map(answered, statuses)]
    transient += [answered(400, code) for code in codes]
    final = [*map(answered, (None, 301, 400, 403, 404, 412, 501)), answered(400, None), KeyError()]
    final += [make('PartialCredentials'), make('InvalidConfig'), answered(400, 'ExpiredToken')]
    final += [exceptions.SSLError(endpoint_url='e', error='CERTIFICATE_VERIFY_FAILED')]
    for error in transient + final:
        assert celery_s3.is_transient(error) is (error in transient), error
        assert S3Backend.exception_safe_to_retry(error) is (error in transient)


@pytest.mark.parametrize(('settings', 'variables', 'root'), [
    ({}, {}, AWS), ({'base_path': '//a/box//'}, {}, f'{AWS}a/box/'),
    ({}, {'DEFAULT_REGION': 'eu-central-1'}, AWS.replace('us-east-1', 'eu-central-1')),
    ({'aws_region': 'us-east-1'}, {'DEFAULT_REGION': 'eu-central-1'}, AWS),
    ({'aws_region': 'moon-1'}, {}, AWS.replace('us-east-1', 'moon-1')),
    ({'aws_region': 'cn-north-1'}, {}, 'https://results.s3.cn-north-1.amazonaws.com.cn/'),
    ({'aws_region': 'us-iso-east-1'}, {}, 'https://results.s3.us-iso-east-1.c2s.ic.gov/'),
    ({'bucket': 'my.results'}, {}, 'https://s3.us-east-1.amazonaws.com/my.results/'),
    ({'bucket': 'My_Results'}, {}, 'https://s3.us-east-1.amazonaws.com/My_Results/'),
    ({'bucket': 'ap-s3alias'}, {}, AWS.replace('results', 'ap-s3alias')),
    *[({'bucket': f'results{zone}'}, {**fips, **dual}, AWS.replace('.s3.', f'{zone}.{host}.'))
      for zone, fips, dual, host in [  # as botocore's own rules for endpoints say
          ('', FIPS, {}, 's3-fips'), ('', {}, DUAL, 's3.dualstack'),
          ('', FIPS, DUAL, 's3-fips.dualstack'), (ZONE, {}, {}, 's3express-use1-az4'),
          (ZONE, FIPS, {}, 's3express-fips-use1-az4'), (LOCAL, {}, {}, 's3express-usw2-lax1-az1'),
          (ZONE, {}, DUAL, 's3express-use1-az4.dualstack'),
          (LOCAL, FIPS, DUAL, 's3express-fips-usw2-lax1-az1.dualstack')]],
    ({}, ANY, 'http://any:1/results/'), ({'endpoint_url': OWN}, ANY, f'{OWN}results/'),
    ({}, {**ANY, 'ENDPOINT_URL_S3': OWN}, f'{OWN}results/'),
    ({'endpoint_url': 'http://[::1]:9000'}, {}, 'http://[::1]:9000/results/'),
    ({}, {'ENDPOINT_URL_S3': OWN, 'IGNORE_CONFIGURED_ENDPOINT_URLS': 'true'}, AWS),
])  # fmt: skip
def test_settings_and_environment_make_the_url(store, monkeypatch, settings, variables, root):
    for name in variables:
        monkeypatch.setenv(f'AWS_{name}', variables[name])
    store.fail_next('GET', (200, {'ETag': 'W/"as a proxy says"', 'Content-Length': '1, 1'}, 'x'))
    bucket = make_bucket(**settings)
    assert bucket.get('k') == (b'x', 'as a proxy says')
    region = settings.get('aws_region') or variables.get('DEFAULT_REGION') or 'us-east-1'
    service = 's3express' if '--' in settings.get('bucket', '') else 's3'
    assert store.sent[0].url == f'{root}k'
    assert f'/{region}/{service}/' in store.sent[0].headers['Authorization']
    folder = settings.get('base_path', '').strip('/')
    assert bucket.uri == f's3://{settings.get("bucket", "results")}/{folder}{"/" * bool(folder)}'


def test_profiles_proxies_and_ca_bundles_are_taken(store, tmp_path, monkeypatch):
    keys = 'aws_access_key_id = PROFILEKEY\naws_secret_access_key = x\n'
    lines = f'[profile worker]\nregion = sa-east-1\nca_bundle = /profile.pem\n{keys}'
    (tmp_path / 'config_file').write_text(lines)
    told = []  # STS is asked in the region that the session knows
    tell = 'botocore.session.Session.set_config_variable'
    monkeypatch.setattr(tell, lambda session, *variable: told.append(variable))
    make_bucket(aws_profile='worker').get('key')
    signed = store.sent[0].headers['Authorization']
    assert 'Credential=PROFILEKEY/' in signed and '/sa-east-1/s3/' in signed
    make_bucket(aws_region='us-gov-west-1')
    assert told == [('region', 'sa-east-1'), ('region', 'us-gov-west-1')]
    monkeypatch.setenv('HTTPS_PROXY', 'http://proxy:3128')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/requests.pem')
    make_bucket()
    monkeypatch.setenv('AWS_CA_BUNDLE', '/aws.pem')
    monkeypatch.setenv('NO_PROXY', '.amazonaws.com')
    make_bucket(max_connections=1)
    used = [(one['verify'], one['proxies'].get('https')) for one in store.made]
    assert used[:2] == [('/profile.pem', None), (True, None)]
    assert used[2:] == [('/requests.pem', 'http://proxy:3128'), ('/aws.pem', None)]
    assert [made['max_pool_connections'] for made in store.made] == [50, 50, 50, 1]
    assert [made['socket_options'] for made in store.made] == [[(6, 1, 1)]] * 4  # TCP_NODELAY
    assert 'timeout' not in store.made[0] and httpsession.DEFAULT_TIMEOUT == 60


@pytest.mark.parametrize('fault', [
    (403, {}, REPEATED), (200, {'Content-Length': '9'}, ''), refusal(403, 'AccessDenied'),
    refusal(503, 'SlowDown'), DROPPED, REFUSED, Ignore(),
])  # fmt: skip
@pytest.mark.parametrize('end', [None, '', '\n'])  # in settings; in the environment, with an end
def test_no_failed_request_shows_a_secret(store, caplog, monkeypatch, fault, end):
    for name in KEYS if end is not None else ():
        monkeypatch.setenv(name.upper(), f'{KEYS[name]}{end}')
    store.fail_next('GET', fault, times=5)
    backend = make_app({'bucket': 'results', **(KEYS if end is None else {})}).backend
    error = pytest.raises((ClientError, exceptions.BotoCoreError, Ignore), backend.get, 'key')
    if isinstance(fault, Ignore) and end != '\n':  # what strikes inside a request ends it
        assert (error.type, store.sent) == (Ignore, ['GET key'])
    assert not re.search(f'{SECRET}|{TOKEN}', show(error, caplog))
    assert all(sent.headers['X-Amz-Security-Token'] == TOKEN for sent in store.sent)
    bucket, pickled = backend.bucket, pickle.dumps(backend)
    shown = backend, bucket, bucket.settings, backend.as_uri(True), pickled
    assert not re.search(f'{SECRET}|{TOKEN}', ' '.join(map(repr, shown)))


@pytest.mark.parametrize(('cause', 'kind', 'proxy'), [
    (REFUSED, exceptions.EndpointConnectionError, ''),
    (socket.gaierror(-2, 'Name or service not known'), exceptions.EndpointConnectionError, ''),
    (TimeoutError('timed out'), exceptions.ConnectTimeoutError, ''),
    (REFUSED, exceptions.ProxyConnectionError, f'http://user:{TOKEN}@proxy:3128'),
])  # fmt: skip
def test_why_a_connection_failed_is_said(clock, caplog, monkeypatch, cause, kind, proxy):
    monkeypatch.setenv('HTTPS_PROXY', proxy)
    monkeypatch.setenv('AWS_SESSION_TOKEN', TOKEN)
    monkeypatch.setattr(socket, 'getaddrinfo', Mock(side_effect=cause))
    error = pytest.raises(kind, make_bucket().get, 'key')
    error.match(re.escape(str(cause)))
    assert not re.search(f'{TOKEN}|EXAMPLEKEY', show(error, caplog))
    assert (caplog.text.count(str(cause)), clock.slept) == (4, [1, 2, 4, 8])


@pytest.mark.parametrize('forms', [('quoted', 'bare'), ('quoted',), ('bare',)])
def test_put_if_the_etag_is_this_in_whatever_form_the_store_wants_it(store, forms):
    store.etag_forms = forms
    bucket = make_bucket()
    won, (_, etag) = bucket.put_if('key', b'1', None)
    assert won and store.take_requests() == ['PUT key']
    assert bucket.put_if('key', b'lost', 'abc') == (False, (b'1', etag))  # a genuine conflict
    assert store.take_requests() == ['PUT key', 'PUT key', 'GET key']
    won, stored = bucket.put_if('key', b'2', etag)
    assert (won, stored) == (True, (b'2', store.etag('key')))
    assert len(store.take_requests()) == (2 if forms == ('bare',) else 1)
    bucket.put_if('key', b'3', stored.etag)
    assert store.take_requests() == ['PUT key']  # only the form that has succeeded
    for outdated in etag, None:
        assert bucket.put_if('key', b'4', outdated) == (False, (b'3', store.etag('key')))
        assert store.take_requests() == ['PUT key', 'GET key']
    for unknown in 'abc', '':
        assert bucket.put_if('gone', b'x', unknown) == (False, None)
    store.fail_next('PUT', (412, {}, ''))
    assert bucket.put_if('key', b'5', None) == (False, (b'3', store.etag('key')))
    store.fail_next('PUT', lost)  # what is found is one's own
    assert bucket.put_if('key', b'6', store.etag('key')) == (True, (b'6', store.etag('key')))
    for etag in None, 'abc':  # a wrong header surfaces as S3's own error
        store.fail_next('PUT', refusal(400, 'InvalidArgument'))
        pytest.raises(ClientError, bucket.put_if, 'key', b'', etag).match('InvalidArgument')
        store.fail_next('PUT', (200, {}, ''))
        error = pytest.raises(exceptions.InvalidConfigError, bucket.put_if, 'key', b'', etag)
        error.match('no ETag: .*conditional_writes')


def test_all_who_map_share_max_connections_threads_or_fewer(started, monkeypatch):
    bucket, here = make_bucket(max_connections=3), threading.current_thread()
    assert [*bucket.map_parallel(str.upper, ['a']), *bucket.map_parallel(str, [])] == [('a', 'A')]
    assert not started  # for one item, or none
    found = bucket.map_parallel(lambda _: threading.current_thread(), [*range(99)])
    assert here not in {thread for _, thread in found}
    with ThreadPoolExecutor(4) as callers:
        found = callers.map(lambda items: [*bucket.map_parallel(str.upper, items)], ['abc'] * 4)
        assert [*found] == [[*zip('abc', 'ABC')]] * 4
    assert len(started) <= 3 + 4
    monkeypatch.delattr('_multiprocessing.SemLock')  # on AWS Lambda, it raises an OSError
    for name in [name for name in sys.modules if name.startswith('multiprocessing')]:
        monkeypatch.setitem(sys.modules, name, None)
    for limit in 0, 1, 5, 99:
        started.clear()
        bucket, items, started.limit = make_bucket(), [*range(100)], limit
        for _ in range(2):
            assert [*bucket.map_parallel(str, items)] == [*zip(items, map(str, items))]
        assert len(started) <= min(limit, 50)


@pytest.mark.parametrize('task_id', ODD_IDS + ODDER_IDS)
def test_any_id_lands_at_exactly_its_key(store, app, task_id):
    app.backend.store_result(task_id, 'value', 'SUCCESS')
    assert list(store.objects) == [TASK + str(bytes_to_str(task_id))]
    assert app.backend.get_result(task_id) == 'value'
    app.backend.set('a\ud800', b'x')  # what has no UTF-8 is written as Python would write it
    assert (app.backend.get('a\ud800'), store.objects['a\\ud800']) == (b'x', b'x')


@pytest.mark.parametrize(('fault', 'why', 'first', 'methods'), [
    (refusal(503, 'SlowDown'), r'SlowDown.* s3://results/box/key \(HTTP 503', 1, 'DELETE GET PUT'),
    (REFUSED, 'key".*: .*Connection refused', 1, 'DELETE GET PUT'),
    (DROPPED, r'\(ConnectionResetError: .*Connection reset by peer\)', 0.2, 'DELETE GET PUT'),
    (refusal(400, 'Throttling'), 'Throttling', 1, 'GET'), ((500, {}, ''), '500', 1, 'GET'),
    ((503, {}, '<html>busy</html>'), '503', 1, 'PUT'), ((200, {}, ERROR), 'Internal', 1, 'PUT'),
    ((200, {'Content-Length': '9, 9'}, 'half'), r'key \(cut short\)', 0.2, 'GET'),
])  # fmt: skip
def test_what_may_pass_is_tried_again_and_logged(store, clock, caplog, fault, why, first, methods):
    bucket = make_bucket(base_path='box')
    verbs = {'GET': bucket.get, 'DELETE': bucket.delete, 'PUT': lambda key: bucket.put(key, b'x')}
    pauses = [first, 2 * first, 4 * first, 8 * first]  # full jitter's longest
    for method in methods.split():
        caplog.clear()
        store.fail_next(method, fault, times=4)
        verbs[method]('key')
        assert store.take_requests() == [f'{method} box/key'] * 5
        said = [one for one in caplog.records if one.levelname == 'WARNING']
        assert [one.getMessage().count('box/key') for one in said] == [1] * 4
        for number, (record, pause) in enumerate(zip(said, pauses), 2):
            assert re.match(f'.*{why}.*; attempt {number} in {pause:.1f} s$', record.getMessage())
    assert clock.slept == pauses * len(methods.split())


@pytest.mark.parametrize('given', [0, 1, 12, -1, 5000])
def test_aws_max_attempts_says_how_often_to_try(clock, monkeypatch, given):
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', str(given))
    monkeypatch.setattr(random, 'uniform', lambda low, high: low + (high - low) / 4)
    monkeypatch.setattr(session.Session, 'get_credentials', lambda _: None)
    pytest.raises(exceptions.NoCredentialsError, make_bucket().get, 'key')
    jittered = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *[5] * 5000]  # of at most 20 seconds
    assert clock.slept == pytest.approx(jittered[: max(given or 5, 1) - 1])


@pytest.mark.parametrize(('answer', 'said'), [
    (refusal(400, 'InvalidTag', message='The tag is bad'),
     r'^An error occurred \(InvalidTag\) when calling the GET s3://results/key \(HTTP 400, region '
     r'us-east-1, x-amz-request-id R1\) operation: The tag is bad$'),
    (refusal(301, 'PermanentRedirect', REGION), '1, x-amz-bucket-region eu, x-amz-request-id R1'),
    (refusal(400, 'AuthorizationHeaderMalformed', REGION), 'us-east-1, x-amz-bucket-region'),
    ((300, {}, ''), r'\(HTTP 300, region us-east-1\)'),  # and not of S3
    ((404, {}, ''), 'HTTP 404'), ((400, {}, '<Error/>'), r'\(400\) when calling'),
    ((400, {}, '<Error><Code>Odd</Code><Message/></Error>'), r'\(Odd\) .* operation: $'),  # Ceph
    ((400, {}, '<Error><Code>Odd</Code></Error>'), r'\(Odd\) .* operation: $'),
    ((404, {}, '<html>not found</html>'), 'HTTP 404'), (refusal(403, 'AccessDenied'), 'HTTP 403'),
])  # fmt: skip
def test_an_error_tells_what_s3_said(store, answer, said):
    store.fail_next('GET', answer)
    error = pytest.raises(ClientError, make_bucket().get, 'key')
    error.match(said)
    assert error.value.response['ResponseMetadata']['HTTPStatusCode'] == answer[0]
    assert store.sent == ['GET key']


def test_a_denied_read_is_a_missing_key_where_that_is_set(store):
    bucket = make_bucket(denied_is_missing=True)
    store.fail_next('', refusal(403, 'AccessDenied'), times=2)
    assert bucket.get('key') is None
    pytest.raises(ClientError, bucket.put, 'key', b'').match('AccessDenied')
    store.fail_next('GET', refusal(403, 'InvalidAccessKeyId'))
    pytest.raises(ClientError, bucket.get, 'key').match('InvalidAccessKeyId')


def test_a_signature_to_the_letter_and_the_headers_of_puts(store, monkeypatch):
    now = datetime(2013, 5, 24)
    monkeypatch.setattr(auth, 'get_current_datetime', lambda: now, raising=False)
    monkeypatch.setattr(auth, 'datetime', Mock(**{'datetime.utcnow.return_value': now}))  # 1.34
    bucket = make_bucket(headers={'x-amz-storage-class': 'REDUCED_REDUNDANCY'})
    bucket.put('test$file.text', b'Welcome to Amazon S3.')
    headers = store.sent[0].headers
    assert headers['X-Amz-Date'] == '20130524T000000Z'
    assert headers['Authorization'] == (
        'AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, '
        'SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-storage-class, '
        'Signature=680d4b8aa6c4d8389afab1018c65aeb5252d12a316860e15cd3ce5d6d1672ad6'
    )
    assert not [name for name in headers if 'checksum' in name.lower()]
    name = "x-amz-meta-!#$%&'*+.^_`|~9"
    bucket = make_bucket(headers={name: 'a = b'})
    for etag in None, store.etag('test$file.text'):
        bucket.put_if('test$file.text', b'', etag)
    assert (bucket.get('key'), bucket.delete('key')) == (None, None)
    with_it = [sent for sent in store.sent if sent.headers.get(name) == 'a = b']
    assert with_it == [sent for sent in store.sent[1:] if sent.startswith('PUT')]


def test_each_attempt_is_signed_with_the_keys_of_the_moment(store, clock, monkeypatch, caplog):
    expired = dict.fromkeys(['access_key', 'secret_key', 'token'], TOKEN)
    expired['expiry_time'] = '2020-01-01T00:00:00Z'
    refresh = credentials.RefreshableCredentials.create_from_metadata
    role = refresh(expired, lambda: expired, 'role')
    unsure = {'Error': {'Code': 'IDPCommunicationError'}, 'ResponseMetadata': {}}
    look_up = Mock(side_effect=[
        exceptions.CredentialRetrievalError(provider='role', error_msg='busy'),
        exceptions.MetadataRetrievalError(error_msg='busy'), None,  # what is missing may come back
        role, ClientError(unsure, 'AssumeRoleWithWebIdentity'), credentials.Credentials('OLD', 'x',
        'token'), credentials.Credentials('NEW', 'x'), *[role] * 7,
    ])  # fmt: skip
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '7')
    monkeypatch.setattr(session.Session, 'get_credentials', look_up)
    store.fail_next('PUT', refusal(503, 'SlowDown'))
    make_bucket().put('key', b'')
    assert clock.slept == [0.2, 0.4, 0.8, 1.6, 16, 20]
    first, second = (sent.headers for sent in store.sent)
    assert ('OLD' in first['Authorization'], first['X-Amz-Security-Token']) == (True, 'token')
    assert 'NEW' in second['Authorization'] and 'X-Amz-Security-Token' not in second
    error = pytest.raises(exceptions.CredentialRetrievalError, make_bucket().get, 'key')
    error.match('from role or process: .* still expired')
    assert TOKEN not in show(error, caplog)


def test_credentials_are_looked_up_by_one_thread_at_a_time(store, app, monkeypatch):
    def meet(one):
        looking.append(one)
        time.sleep(0.01)
        assert looking.pop() is one and not looking
        return look_up(one)

    look_up, looking = session.Session.get_credentials, []
    monkeypatch.setattr(session.Session, 'get_credentials', meet)
    assert app.backend.mget([*'abcdefgh']) == [None] * 8


def test_who_listens_to_botocores_events_may_answer_in_place_of_s3(store, monkeypatch):
    answer = awsrequest.AWSResponse(AWS, 200, {'ETag': '"e"'}, None)
    answer._content = b'mocked'
    listen = Mock(side_effect=[answer, answer, answer, None])  # moto's mock_aws listens so, too
    listeners = [*handlers.BUILTIN_HANDLERS, ('before-send', listen)]
    monkeypatch.setattr(handlers, 'BUILTIN_HANDLERS', listeners)
    bucket = make_bucket()
    assert (bucket.get('key'), bucket.put('key', b'')) == ((b'mocked', 'e'), None)
    assert (bucket.delete('key'), store.sent) == (None, [])
    assert (bucket.get('key'), store.sent) == (None, ['GET key'])
    heard = [(one.kwargs['event_name'], one.kwargs['request'].url) for one in listen.mock_calls]
    names = 'Get', 'Put', 'Delete', 'Get'
    assert heard == [(f'before-send.s3.{name}Object', f'{AWS}key') for name in names]


# S3KeyValueBackend


def test_making_a_backend_sends_nothing_and_imports_no_boto3(store, app, started):
    assert app.backend.thread_safe  # else Celery makes one for each thread
    assert not store.sent and not started
    program = 'import celery_s3, sys; sys.exit("boto3" in sys.modules)'
    folder = os.path.dirname(celery_s3.__file__)
    assert subprocess.run([sys.executable, '-c', program], cwd=folder).returncode == 0
    spec = importlib.util.spec_from_file_location('vendored', celery_s3.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.S3Backend(app=app).get('key') is None and 'vendored' not in sys.modules


@pytest.mark.parametrize('value', ['text', 'é', b'\x80bytes', b'', b'x' * 5_000_000, ERROR])
def test_values_come_back_as_bytes(store, app, value):
    app.backend.set(b'key', value)
    assert app.backend.get(b'key') == (value.encode() if isinstance(value, str) else value)
    app.backend.set('key', b'other')
    assert app.backend.bucket.get('key') == (b'other', store.etag('key'))
    assert app.backend.mget(iter(['none', b'key', 'none'])) == [None, b'other', None]
    app.backend.delete(b'key')
    store.fail_next('DELETE', refusal(404, 'NoSuchKey'))  # as some stores answer
    assert (app.backend.delete('key'), app.backend.get('key')) == (None, None)
    methods = [request.split()[0] for request in store.take_requests()]
    assert methods == ['PUT', 'GET', 'PUT', 'GET', *['GET'] * 3, 'DELETE', 'DELETE', 'GET']


def test_poll_store_fetch_and_forget_cost_one_request_each(store):
    app = make_app(result_compression='gzip')
    result = AsyncResult('id', app=app)
    assert result.state == 'PENDING'
    app.backend.store_result('id', 'x' * 10_000, 'SUCCESS')
    assert len(store.objects[f'{TASK}id']) < 1000 or celery.VERSION < (5, 7)
    assert result.get() == 'x' * 10_000
    assert (result.forget(), store.objects) == (None, {})
    assert store.sent == [f'{method} {TASK}id' for method in ('GET', 'PUT', 'GET', 'DELETE')]
    assert app.backend.supports_autoexpire  # so that Celery beat schedules no clean-up


@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_fork_shares_neither_connections_nor_locks(store, app, monkeypatch):
    def fork(_):  # under the lock
        child = os.fork()
        if not child:
            patch.undo()
            worker = threading.Thread(target=app.backend.mget, args=['ab'], daemon=True)
            worker.start()
            worker.join(60)
            os._exit(store.sessions[-1] is parent or worker.is_alive())
        assert os.waitpid(child, 0)[1] == 0

    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
    app.backend.mget(['a', 'b'])
    parent = store.sessions[-1]
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, 'get_credentials', fork)
        pytest.raises(exceptions.NoCredentialsError, app.backend.get, 'a')
    app.backend.get('a')
    assert store.sessions[-1] is parent


@pytest.mark.parametrize('room', [*ROOMS, celery_s3.S3KeyValueBackend])
def test_each_method_overrides_one_of_celerys(room):  # if it is public or says so, and only then
    ours = {name for name in vars(room) if name[:2] != '__'} - {'bucket'}
    names = {name for name in ours if name[0] != '_'}
    names |= {name for name in ours if f'{vars(room)[name].__doc__}'.startswith('Celery calls')}
    if celery.VERSION < (5, 7):
        names -= {'_fail_chain', 'supports_result_compression'}
    assert names == {name for name in ours if hasattr(KeyValueStoreBackend, name)}
    for name in names - {'key_t', 'exception_safe_to_retry'}:
        both = getattr(room, name), getattr(KeyValueStoreBackend, name)
        if callable(both[0]):
            ours, theirs = (str(inspect.signature(one)) for one in both)
            assert ours == theirs


# For waiting and for chords


def test_ever_more_are_looked_at_until_one_is_not_ready():
    for not_ready, looked in ([], 12), ([0, 5], 1), ([1], 4), ([3, 4], 4), ([4], 12), ([11], 12):
        metas = {one: {'status': 'RETRY' if one in not_ready else 'SUCCESS'} for one in range(12)}
        found = celery_s3.look_until_not_ready(make_bucket(), metas.get, [*metas], 1)
        assert [*found] == [*metas.items()][:looked]


# Storing


def test_each_state_is_one_put_on_the_last_and_the_first_must_find_nothing(store):
    backend, etags = make_app(result_extended=True).backend, []
    request = Context(id='id', task='add', args=[1], kwargs={}, group='g', parent_id='p')
    for state in 'STARTED', 'PROGRESS', 'PROGRESS', 'RETRY', 'STARTED', 'SUCCESS':
        backend.store_result('id', len(etags), state, f'line {len(etags)}', request)
        backend.store_result('parent', len(etags), 'PROGRESS', request=request)
        etags.append(f'"{store.etag(f"{TASK}id")}"')
    sent = [one for one in store.sent if one.endswith('-id')]
    assert sent == [f'PUT {TASK}id'] * 6
    assert [one.headers.get('If-Match') for one in sent] == [None, *etags[:-1]]
    assert [one.headers.get('If-None-Match') for one in store.sent[:2]] == ['*'] * 2  # parent's
    names = 'task_id result traceback name args group_id parent_id'.split()
    kept = [backend.get_task_meta('id')[name] for name in names]
    assert kept == ['id', 5, 'line 5', 'add', [1], 'g', 'p']
    assert backend.get_result('parent') == 5


@pytest.mark.parametrize('first', STATES)
@pytest.mark.parametrize('later', STATES)
@pytest.mark.parametrize('writer', ['the same', 'another', 'one that stored STARTED before'])
def test_nothing_replaces_a_success_and_all_else_is_replaced(store, app, first, later, writer):
    request, late = Context(id='id'), Context(id='id')
    if writer == 'one that stored STARTED before':
        app.backend.store_result('id', None, 'STARTED', request=late)
    app.backend.store_result('id', LATE, first, request=request)
    late = request if writer == 'the same' else late
    for attempt in 'once', 'twice':
        store.take_requests()
        # Each of many workers stores REVOKED, and one is enough.
        stays = first == 'SUCCESS' or (first == later == 'REVOKED' and writer == 'another')
        app.backend.store_result('id', {**LATE, 'exc_message': attempt}, later, request=late)
        sent = ' '.join(one.split()[0] for one in store.take_requests())
        if first == 'SUCCESS':
            assert sent in ('PUT GET', 'PUT PUT GET')
        elif attempt == 'once' and writer == 'another':
            assert sent == ('PUT GET' if stays else 'PUT GET PUT')
        first = first if stays else later
        assert app.backend.get_state('id') == first


@pytest.mark.parametrize('sequence', ['SUCCESS', 'STARTED SUCCESS', 'STARTED PROGRESS FAILURE'])
def test_an_answer_lost_after_the_write_ends_in_the_right_state(store, app, sequence):
    request = Context(id='id')
    for state in sequence.split():
        store.fail_next('PUT', lost)
        app.backend.store_result('id', LATE, state, request=request)
        assert app.backend.get_state('id') == state
    app.backend.store_result('id', 'next', 'PROGRESS', request=request)
    assert app.backend.get_state('id') == ('SUCCESS' if state == 'SUCCESS' else 'PROGRESS')


@pytest.mark.parametrize(('state', 'conflicts'), [
    *[('SUCCESS', conflicts) for conflicts in (3, 37, 39)], *[(state, 99) for state in STATES[:3]],
])  # fmt: skip
def test_a_state_gives_way_to_others_unless_it_is_final(store, app, clock, state, conflicts):
    store.finish('id', 'others', 'PENDING')
    store.fail_next('PUT', refusal(412, 'PreconditionFailed'), times=conflicts)
    write = functools.partial(app.backend.store_result, 'id', LATE, state, request=Context(id='p'))
    if conflicts == 39:
        error = pytest.raises(BackendStoreError, write)
        error.match('others store .*s3:GetObject')
        assert (error.value.state, error.value.task_id) == ('SUCCESS', 'id')
    else:
        assert write() == LATE
    assert app.backend.get_state('id') == (state if conflicts < 39 else 'PENDING')
    pauses = min(conflicts // 2, 18) if state == 'SUCCESS' else 0  # from the third attempt on
    assert clock.slept == [0.2] * pauses
    assert store.sent.count(f'PUT {TASK}id') == (min(conflicts + 1, 39) if pauses else 3)


@pytest.mark.parametrize('name', ['S3Backend', 'S3KeyValueBackend'])
def test_without_conditional_writes_celery_reads_before_it_writes_and_chords_poll(store, name):
    app = make_app({'bucket': 'results', 'conditional_writes': False}, name)
    for state, result in ('STARTED', None), ('SUCCESS', 'right'), ('FAILURE', LATE):
        app.backend.store_result('id', result, state)
    assert store.take_requests() == [f'GET {TASK}id', f'PUT {TASK}id'] * 2 + [f'GET {TASK}id']
    assert app.backend.get_result('id') == 'right'
    chord([app.tasks['add'].s(1).set(task_id='a')], app=app)(app.tasks['total'].s())
    (_, _, part), (unlock, _, _) = sorted(app.take_messages(), key=lambda message: message[0])
    assert unlock == 'celery.chord_unlock'
    part.ignore_result = name == 'S3Backend'
    app.backend.mark_as_done('a', 1, part)
    assert store.sent == [f'GET {TASK}id', f'GET {TASK}a', f'PUT {TASK}a']
    assert not [sent for sent in store.sent if {'If-Match', 'If-None-Match'} & set(sent.headers)]


# Waiting


@pytest.mark.parametrize(('ends', 'stuck', 'late', 'most'), [
    ([4], 0, 0.5, 9), ([600], 0, 30, 80), ([3600], 0, 30, 200),  # the longer, the less is asked
    ([600, 640], 0, 4, 150),  # from the latest that has ended
    ([600] * 300, 0, 30, 300 + 2 * 600),  # a running group costs two requests a second
    ([2 * number for number in range(1, 301)], 20, 15, 2400),  # the stuck hide no other
    ([0], 99, 61, 200),
])  # fmt: skip
def test_what_ends_is_found_soon_and_cheaply(store, app, clock, ends, stuck, late, most):
    for number, end in enumerate(ends):
        clock.at(end, store.finish, f'{number}', number)
    for number in range(-stuck, 0):
        store.finish(f'{number}', status='STARTED')
    results = app.results_of(*map(str, range(-stuck, len(ends))))
    found = results.iter_native(timeout=9999)
    assert sorted(next(found)[1]['result'] for _ in ends) == [*range(len(ends))]
    assert ends[-1] <= clock.now <= ends[-1] + late and len(store.sent) <= most
    assert stuck or results.join(timeout=0) == [*range(len(ends))]


def test_an_interrupted_join_waits_for_no_request(store, app):
    left, struck, main = threading.Event(), threading.Event(), threading.main_thread().ident

    def strike(*_):
        if not struck.is_set():
            struck.set()
            raise KeyboardInterrupt

    def interrupt(sent):
        # Until the join waits, Python may swallow it. Who is about to wait may sleep through it.
        while sent != f'GET {TASK}0' and not left.wait(0.01):
            frames = traceback.walk_stack(sys._current_frames()[main])
            stack = [frame.f_code.co_name for frame, _ in frames]
            if sent == f'GET {TASK}1' and stack[1] == 'result' and not struck.is_set():
                signal.pthread_kill(main, signal.SIGINT)
            if 'shutdown' in stack:
                return left.set()

    for number in range(9):
        store.finish(str(number), number)
    store.gate = interrupt
    before = signal.signal(signal.SIGINT, strike)  # ignored, in a background job of a shell
    try:
        with pytest.raises(KeyboardInterrupt):
            app.results_of(*map(str, range(9))).get(timeout=9)
        assert not left.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        left.set()


@pytest.mark.parametrize('timeout', [0, 0.3, 7, 100])
@pytest.mark.parametrize('slow', [0, 5])  # seconds that a request takes
def test_a_timeout_is_on_time_and_keeps_nothing_back(store, app, clock, timeout, slow):
    pending, ready = ([f'{name}{number}' for number in range(9)] for name in ('p', 'r'))
    for task_id in ready:
        clock.at(0 if slow else timeout, store.finish, task_id)
    store.gate = lambda sent: clock.sleep(slow) if slow else None
    found = app.results_of(*pending, *ready).iter_native(timeout=timeout)
    assert {next(found)[0] for _ in ready} == {*ready}
    pytest.raises(celery.exceptions.TimeoutError, next, found).match(f'timed out .{timeout}')
    assert slow or clock.now == timeout
    assert app.results_of(*ready).get(timeout=0) == [None] * 9


def test_a_timeout_holds_for_inner_groups_and_nobody_is_asked_twice(store, app, clock):
    inner = app.results_of('pending', 'ready too')
    group = GroupResult('outer', [AsyncResult('ready', app=app), inner], app=app)
    for task_id in 'ready', 'ready too':
        store.finish(task_id, task_id)
    pytest.raises(celery.exceptions.TimeoutError, group.get, timeout=2)
    assert clock.now == 2
    store.objects.clear()
    store.finish('pending', 1)
    store.take_requests()
    for _ in range(2):
        assert group.get(timeout=0) == ['ready', [1, 'ready too']]
    assert store.take_requests() == [f'GET {TASK}pending']


def test_a_set_takes_odd_ids_and_eager_results_but_no_id_twice(store, app):
    ids = uuid.uuid4(), 'a'
    for number, task_id in enumerate(ids):
        store.finish(f'{task_id}', number)
        assert AsyncResult(task_id, app=app).get(timeout=0) == number
    results = [*app.results_of(*ids), EagerResult('b', 7, 'SUCCESS')]
    assert app.ResultSet(results, app=app).get(timeout=0) == [0, 1, 7]
    pytest.raises(ValueError, app.results_of('a', 'a').get, timeout=0).match(r'twice.*join\(\)')
    assert app.results_of('a', 'a').join(timeout=0) == [1, 1]


def test_what_else_a_caller_may_set_is_as_in_celery(store, clock):
    app, messages, seen = make_app(result_cache_max=10), [], []
    clock.at(500, store.finish, 'id', 42)
    app.backend.wait_for('id', 999, 5, on_interval=lambda: seen.append(len(store.sent)))
    assert (clock.slept, seen) == ([5] * 100, [*range(1, 101)])  # after a pause, before a look
    store.finish('a')
    store.finish('b', LATE, status='FAILURE')
    found = app.backend.get_many([*'pqrs', b'a', 'b'], None, 1, True, messages.append, None, 2)
    assert {one for one, _ in found} == {meta['task_id'] for meta in messages} == {'a', 'b'}
    assert clock.slept[100:] == [1, 1]
    pytest.raises(ValueError, AsyncResult('b', app=app).get, timeout=0).match('late')
    store.finish('b', 42)  # a task may be tried again; a SUCCESS stays
    assert app.backend.is_cached('a') and AsyncResult('b', app=app).get(timeout=0) == 42
    assert [len([*app.backend.get_many(ids, max_iterations=0)]) for ids in ('', 'a')] == [0, 1]


# Chords


def play(parts, mine, answers):  # the next step: (key, *what it writes), or ('end', its claim)
    def ask(*step):
        for answer in left:
            return answer
        raise EOFError(*step)

    def look(ids):
        for one in ids:
            yield one, {'status': (status := ask(one)[0])}
            if status == 'PENDING':
                return

    def swap(phase, turn):
        nonlocal version
        version += 1
        return ask('note', version, mine, turn)

    left = iter(answers)
    try:
        ask(mine, 'SUCCESS')
        version, *turns = ask('note')
        return 'end', mine in turns and claim(parts, look, swap)
    except EOFError as stop:
        return stop.args


@pytest.mark.parametrize('parts', ['ab', 'abc'])
@pytest.mark.parametrize('shuffle', [lambda ids: None, list.reverse])
def test_exactly_one_part_claims_in_every_interleaving(monkeypatch, parts, shuffle):
    @functools.cache
    def walk(stored, histories):
        steps = [play(parts, *one) for one in zip(parts, histories)]
        if {step[0] for step in steps} == {'end'}:
            claims = [claimed for _, claimed in steps if claimed]
            assert claims == [dict.fromkeys(parts, {'status': 'SUCCESS'})]
        for number, (key, *written) in enumerate(steps):
            objects, after = dict(stored), [*histories]
            answer = objects.get(key, ('PENDING',))
            if written:
                answer = key != 'note' or written[0] == answer[0] + 1
                objects[key] = tuple(written) if answer else objects[key]
            after[number] += (answer,)
            if key != 'end':
                walk(frozenset(objects.items()), tuple(after))

    monkeypatch.setattr(random, 'shuffle', shuffle)
    walk(frozenset({'note': (0, None, parts[-1])}.items()), ((),) * len(parts))
    assert walk.cache_info().currsize > 40


def test_record_note_and_log_say_who_goes_on(store, caplog):
    app = make_app({'bucket': 'results', 'max_connections': 1})  # so that requests have an order
    (a, b, c), result, chord_id = app.begin(*'abc')
    record, header = store.find_record(CHORD + chord_id), [[[one, None], None] for one in 'abc']
    assert json.loads(store.objects[record]) == {'result': [[result.parent.id, None], header]}
    for part in a, c, b:
        app.finish(part)
    assert (app.take_bodies(), store.left_behind(*'abc')) == ([[[1, 1, 1]]], set())
    sent = ' '.join(store.sent).replace(TASK, '').replace(record, 'RECORD')
    assert re.sub(f'{CHORD}\\S+', 'NOTE', sent).replace(result.id, 'BODY') == (
        'PUT RECORD PUT RECORD PUT NOTE PUT a GET NOTE '
        'PUT c GET NOTE GET RECORD GET a GET b GET c PUT NOTE GET b '
        'PUT b GET NOTE GET RECORD GET a GET b GET c GET BODY PUT NOTE DELETE RECORD DELETE NOTE'
    )
    puts = [(one, one.headers.get('If-Match')) for one in store.sent if one.startswith('PUT')]
    assert all(etag or one.headers['If-None-Match'] == '*' for one, etag in puts)
    written, etags = zip(*[(one.body, etag) for one, etag in puts if CHORD in one])
    assert [*etags] == [None, *(f'"{hashlib.md5(one).hexdigest()}"' for one in written[:2])]
    written = [*map(json.loads, written)]
    nonces = {record[-36:], *(one.pop('nonce') for one in written)}
    assert len({*map(uuid.UUID, nonces)}) == 4
    both = {'shown': None, 'body': result.id, 'record': f'{chord_id}.{record[-36:]}'}
    assert written == [
        {'phase': 'open', 'by': None, 'turn': 'c', **both},
        {'phase': 'waiting', 'by': 'c', 'turn': 'b', **both},
        {'phase': 'sending', 'by': 'b', 'turn': None, **both},
    ]
    said = 'begun, c goes on; a leaves it to c; c writes waiting, b; b writes sending, None'
    lines = [one.getMessage() for one in caplog.records if one.levelname == 'DEBUG' and one.args]
    lines = [line.split(': ')[1] for line in lines if line.startswith(f'chord {chord_id}: ')]
    assert '; '.join(lines) == said


@pytest.mark.parametrize(('size', 'order'), [
    (100, 'in order'), (20, 'any'), (100, 'any'), (100, 'last first'),
])  # fmt: skip
def test_what_a_part_costs(store, app, monkeypatch, size, order):
    dice, ids = random.Random(size), [*map(str, range(size))]
    monkeypatch.setattr(random, 'shuffle', dice.shuffle)
    for _ in range(2):
        store.objects.clear()
        parts, *_ = app.begin(*ids)
        if order == 'any':
            dice.shuffle(parts)
        elif order == 'last first':
            parts.insert(0, parts.pop())
        for part in parts:
            app.finish(part, int(part.id))
        assert app.take_bodies() == [[[*range(size)]]]
    assert not store.left_behind(*ids)
    # The rest: note and record, written, read, deleted; a claim; the body's state; conditions.
    assert len(store.sent) <= 2 * ((3 if order == 'in order' else 5) * size + 7) + 1


def test_a_store_that_ignores_conditions_is_found_out(store, app):
    store.ignores_conditions = True
    error = pytest.raises(ImproperlyConfigured, app.begin, 'a')
    error.match('this store ignores If-Match.* conditional_writes to False')
    assert [sent.split()[0] for sent in store.sent] == ['PUT', 'PUT', 'DELETE']
    assert not store.objects and not app.take_messages()


@pytest.mark.parametrize('meanwhile', ['', 'lost', 'lost, a part goes on', 'the chord ends'])
def test_a_start_deletes_its_record_if_the_note_names_another(store, app, meanwhile):
    def act(answer):
        if meanwhile == 'the chord ends':
            del store.objects[store.find_record(note)], store.objects[note]
            return answer()
        answer()
        if meanwhile == 'lost, a part goes on':
            store.rewrite(note, phase='waiting', by='b', turn='a')
        raise DROPPED

    body = app.tasks['total'].s().set(task_id='body')
    parts, note = app.results_of('a', 'b').results, f'{CHORD}g.b'
    if 'lost' not in meanwhile:  # it is a second start
        app.backend.apply_chord(('g', parts), body)
    if meanwhile:
        store.fail_next(f'{"PUT" if "lost" in meanwhile else "GET"} {note}', act)
    app.backend.apply_chord(('g', parts), body)
    goes_on = meanwhile != 'the chord ends'
    assert len([key for key in store.objects if key.startswith(GROUP)]) == goes_on
    for task_id in 'b', 'a':
        app.finish(Context(id=task_id, chord=json.loads(json.dumps(body))))
    assert len(app.take_bodies()) == goes_on
    assert not store.left_behind(*'ab')


@pytest.mark.parametrize('phase', ['sending', 'open'])  # after 'open': a start, written once more
@pytest.mark.parametrize('sign', SIGNS)
@pytest.mark.parametrize('when', [0, 20])
def test_a_second_delivery_does_what_is_left(store, app, clock, caplog, phase, sign, when):
    def race(answer):  # another one is about to tell the outer chord as well, and dies
        store.rewrite(outer, phase='sending', by='b', turn=None)
        return answer()

    add, total = app.tasks['add'], app.tasks['total']
    inner = chord([add.s(1).set(task_id='a')], total.s().set(task_id='b'), app=app)
    result = chord([inner], app=app)(total.s())
    [part] = [request for name, _, request in app.take_messages() if name == 'add']
    note, outer = sorted([one for one in store.objects if CHORD in one], key=lambda one: one[-1])
    shown = None
    if sign == 'RETRY':  # by a task that has replaced itself by the chord
        store.finish('b', LATE, 'RETRY')
        shown = store.etag(f'{TASK}b')
    if phase == 'sending':
        store.rewrite(note, phase='sending', by='a', turn=None, shown=shown)
    if sign == 'the record goes' or phase == 'open':
        clock.at(0 if phase == 'open' else when, store.objects.pop, store.find_record(note))
    if sign not in (None, 'the record goes', 'RETRY'):
        clock.at(when, store.finish, 'b', LATE, sign[:7])
    store.fail_next(f'PUT {outer}', race, times=sign == 'FAILURE twice')
    app.finish(part, 5)
    is_known = sign not in (None, 'the record goes') or (sign and phase == 'sending')
    is_known = is_known and (sign, phase) != ('RETRY', 'sending')
    is_late = when > 0 and 'RETRY' not in str(sign)
    assert clock.slept == [30] * (not is_known or is_late) + [30] * (sign == 'FAILURE twice')
    assert len(re.findall(r'chord \S+: [ab] waits 30 s', caplog.text)) == len(clock.slept)
    assert app.take_bodies() == ([] if is_known or phase == 'open' else [[[5]]])
    fails = f'{sign}'.startswith('FAILURE') or (phase == 'open' and not is_known)
    assert app.backend.get_state(result.id) == ('FAILURE' if fails else 'PENDING')  # it is told
    assert len(store.left_behind('a', 'b', result.id)) == (0 if fails else 2)  # of the outer one
    assert store.sent.count(f'PUT {TASK}b') == (fails and not is_known)  # and no error else


@pytest.mark.parametrize('meanwhile', ['it ends', 'others write', 'lost'])
@pytest.mark.parametrize('fails', [True, False])  # as a body does, which nobody delivers again
def test_what_happens_while_the_note_is_written(store, app, clock, meanwhile, fails):
    def act(answer):
        store.finish('a', 4)  # but its delivery has read the note before this one writes it
        if meanwhile == 'others write':  # another delivery of this part, which dies
            store.rewrite(CHORD + chord_id, phase='sending', by='b', turn=None)
        return answer()

    (a, b), result, chord_id = app.begin('a', 'b')
    if meanwhile != 'it ends':
        store.finish('a', 4)
    store.fail_next(f'PUT {CHORD}{chord_id}', lost if meanwhile == 'lost' else act)
    if fails:
        signature = app.tasks['add'].s().set(task_id='b', chord=b.chord)
        app.backend._fail_chain([dict(signature)], ValueError('boom'))
        assert app.backend.get_state(result.id) == 'FAILURE'
        assert (30 in clock.slept) == (meanwhile == 'others write')
    for part, sent in (b, not fails and meanwhile != 'others write'), (a, False):
        app.finish(part, 4)
        assert app.take_bodies() == [[[4, 4]]] * sent


@pytest.mark.parametrize(('part', 'record', 'said'), [
    (LATE, 'kept', "Dependency a raised ValueError('late'"),
    ({**LATE, 'exc_type': 'CancelledError', 'exc_module': 'asyncio.exceptions'}, 'kept',
     'Dependency a raised CancelledError('), (None, 'mistake', 'of our own'),
    ('no error, so that none can decode it', 'kept', 'Dependency a raised '),
    (None, 'kept', "Callback error: OSError('away'"), (None, 'lost', ' no longer exists'),
    (None, b'{"result": 5}', 'Cannot restore group: '),
])  # fmt: skip
def test_a_body_that_is_not_sent_fails_once(store, app, monkeypatch, caplog, part, record, said):
    parts, result, chord_id = app.begin('a', 'b')
    store.finish('a', part, 'REVOKED' if part else 'SUCCESS')
    key = store.find_record(CHORD + chord_id)
    if isinstance(record, bytes):
        store.objects[key] = record
    elif record == 'lost':
        del store.objects[key]
    elif record == 'mistake':
        monkeypatch.setattr(celery_s3, 'nest_values', Mock(side_effect=TypeError(said)))
    monkeypatch.setattr(app.amqp, 'send_task_message', Mock(side_effect=OSError('away')))
    for delivery in parts[1], Context(vars(parts[1])):
        app.finish(delivery)
    assert celery_s3.CHORD_ID not in str(app.amqp.send_task_message.mock_calls)
    assert said in str(AsyncResult(result.id, app=app).result)
    assert store.sent.count(f'PUT {TASK}{result.id}') == 1
    assert store.left_behind('a', 'b') == {f'{TASK}{result.id}'}
    [line] = [one for one in caplog.records if one.levelname == 'ERROR']
    assert chord_id in line.getMessage() and said in str(line.exc_info[1])


@pytest.mark.parametrize('refusals', [3, 99])
def test_what_broker_and_store_refuse(store, app, clock, monkeypatch, caplog, refusals):
    monkeypatch.setattr('kombu.utils.functional.sleep', clock.sleep)
    monkeypatch.setattr('kombu.utils.functional.time', clock.monotonic)
    [part], result, _ = app.begin('a')
    effects = [celery.exceptions.OperationalError('refused')] * refusals + [DEFAULT]
    send = Mock(wraps=app.amqp.send_task_message, side_effect=effects)
    monkeypatch.setattr(app.amqp, 'send_task_message', send)
    store.fail_next('DELETE', refusal(403, 'AccessDenied'), times=9)
    app.finish(part)
    # An attempt each second. It was seen to take 4.3 seconds; then a grace may end.
    assert send.call_count == clock.now + 1 == 4 or 20 < clock.now < celery_s3.SENDING_GRACE - 4.3
    said = '' if refusals == 3 else "Callback error: OperationalError('refused'"
    assert said in str(AsyncResult(result.id, app=app).result)
    assert len(app.take_bodies()) == (refusals == 3)
    *_, line = (one for one in caplog.records if one.levelname == 'ERROR')
    assert 'is not deleted' in line.getMessage() and 'AccessDenied' in str(line.exc_info[1])


def test_ids_and_nesting_are_whatever_celery_takes_and_the_users_group_stays(store, app):
    (a, b), number = app.results_of('a', 'b'), uuid.UUID(int=7)
    inner = GroupResult('inner', [b, app.results_of(number)], app=app)
    header = GroupResult('header', [a, inner, a], app=app)
    body = app.tasks['total'].s()
    for value, task_id in enumerate(['a', 'b', number]):
        app.backend.apply_chord(('header', header.results), body)  # by a starter that comes again
        header.delete()  # the chord does not need it
        header.save()
        app.finish(Context(id=task_id, chord=json.loads(json.dumps(body))), value)
    assert app.take_bodies() == [[[0, [1, [2]], 0]]]
    assert store.left_behind('a', 'b', number) == {f'{GROUP}header'}
    assert GroupResult.restore('header', app=app) == header


@pytest.mark.parametrize('end', ['SUCCESS done', 'FAILURE failure', 'REVOKED revoked'])
@pytest.mark.parametrize('ignored', [True, False])
def test_a_part_that_ignores_its_result_has_it_stored_once(store, app, end, ignored):
    parts, _, chord_id = app.begin('a', 'b')
    parts[0].ignore_result = ignored
    state, name = end.split()
    app.backend.store_result('another task', 1, state, request=parts[0])
    store.take_requests()
    mark, value = getattr(app.backend, f'mark_as_{name}'), ValueError() if name == 'failure' else 1
    mark('a', value, request=parts[0], store_result=not ignored)
    assert store.take_requests() == [f'PUT {TASK}a', f'GET {CHORD}{chord_id}']
    assert app.backend.get_state('a') == state
    app.finish(parts[1])
    assert len(app.take_bodies()) == (state == 'SUCCESS')


@pytest.mark.parametrize('stores', [True, False])
def test_a_failure_is_stored_for_those_chained_after_it_unless_it_is_ignored(store, app, stores):
    store.finish('c', status='STARTED')  # as a task shows that was replaced by a chain
    rest = [dict(app.tasks['add'].s().set(task_id=task_id)) for task_id in ('c', 'b')]
    request = Context(id='a', chain=rest)
    app.backend.mark_as_failure('a', ValueError('boom'), request=request, store_result=stores)
    assert bool(store.sent) == stores
    states = [app.backend.get_state(task_id) for task_id in 'abc']
    assert states == (['FAILURE'] * 3 if stores else ['PENDING', 'PENDING', 'STARTED'])


@pytest.mark.parametrize('odd', [None, 5, 'text', [], {}, {'options': 5}, {'options': {}}])
def test_odd_messages_and_notes_end_no_worker(store, app, odd):
    for task_id in 'id', None:
        app.backend.on_chord_part_return(Context(id=task_id, chord=odd), 'SUCCESS', 1)
    app.backend._fail_chain(odd, ValueError('boom'))
    unknown = SimpleNamespace(name='unknown', chord=None, root_id=None, errbacks=None)  # no id
    app.backend.mark_as_failure('none', NotRegistered('unknown'), request=unknown)
    assert app.backend.get_state('none') == 'FAILURE'
    [part], _, chord_id = app.begin('a')
    store.objects[CHORD + chord_id] = b'{"next": ["a"]}'  # of the third edition
    app.finish(part)
    assert not app.take_bodies()


# A real Celery worker


def test_chords_of_every_shape_give_their_value_or_their_error(store):
    app = make_app()
    names = 'add fail ignored replaced retried total'.split()
    add, fail, ignored, replaced, retried, total = (app.tasks[name].s for name in names)
    pair = group(add(1), add(2), app=app)
    nested = add(1) | group(add(1) | pair, add(5), app=app)
    inner = chord([add(1), add(2)], total(), app=app)
    after = chord([total(), total()], total(), app=app)  # it takes what another chord gives
    stamped = chord([add(1), add(2)], total())
    stamped.stamp(**dict.fromkeys(['note', 'next', 'record', 'celery_s3', 'chord_id'], 'any'))
    values = {
        'groups in chains in groups': (chord([nested], total()), 13),
        'a part that is retried': (chord([retried(1), add(2)], total()), 3),
        'a part replaced by a group': (chord([replaced('add'), add(3)], total()), 6),
        'a chord in a group in a chain': (chord([add(1) | group(inner)], total()), 5),
        'beside a task': (chord([add(1) | group(add(1), inner, app=app)], total()), 7),
        'in a body': (chord([chord([add(1)], group(after, total())), add(1)], total()), 4),
        'ignored': (chord([add(1), ignored(2)], total()), 3), 'stamped': (stamped, 3),
        'ignored, by name': (chord([add(1), app.signature('ignored', [2])], total()), 3),
    }  # fmt: skip
    bodies = {
        'a chord': after, 'a chain': total() | add(1), 'a group': group(total(), total(), app=app),
        'a chain in a group': group(total(), total() | add(1), app=app),
        'a chain alone in a group': group(total() | add(1), app=app),
        'a chord in a group': group(after, total(), app=app),
    }  # fmt: skip
    silent = fail().set(ignore_result=True)
    errors = {name: chord([add(1), chord([fail()], bodies[name])], total()) for name in bodies}
    errors |= {
        'an inner chord, first': chord([chord([add(1), fail()], total()), add(1)], total()),
        'group | group': group(fail(), add(1), app=app) | bodies['a chain in a group'],
        'replaced by a group that fails': chord([replaced('fail'), add(1)], total()),
        'ignored, and its body a chain': chord([silent, add(1)], total() | add(1)),
        'ignored, in a chain': chord([silent | add(1).set(ignore_result=True)], total()),
    }
    with working(app):
        for shape, (signature, value) in values.items():
            assert (shape, app.fetch(signature)) == (shape, value)
        store.take_requests()
        for shape, signature in errors.items():
            # A result's own get() would raise the error of a parent.
            for task in celery_s3.list_tasks([signature.apply_async()]):
                app.backend.wait_for(task.id, timeout=60, interval=0.01)
                # (Celery 5.6 later revokes those that are in a group.)
                [sent] = [one for one in store.sent if one == f'PUT {TASK}{task.id}'][:1]
                assert b'FAILURE' in sent.body and b'boom' in sent.body, shape
        puts = [
            one for one in store.sent if TASK in one and one.body and b'REVOKED' not in one.body
        ]
        assert len(puts) == len({*puts})  # each once


@pytest.mark.parametrize('missing', [[ROOMS[0]], [ROOMS[1]], [ROOMS[2]], ROOMS])
def test_each_class_can_be_taken_out_and_all_three(store, monkeypatch, missing):
    rest = [room for room in ROOMS if room not in missing] or [celery_s3.S3KeyValueBackend]
    monkeypatch.setattr(celery_s3, 'Rest', type('Rest', (*rest,), {}), raising=False)
    with working(make_app(backend='Rest')) as app:
        add, fail, total = (app.tasks[name].s for name in 'add fail total'.split())
        assert app.fetch(add(1, 2)) == 3
        assert app.fetch(group(add(1), add(2), app=app)) == [1, 2]
        assert app.fetch(add(1) | add(2) | add(3)) == 6
        assert app.fetch(chord([add(1), add(2)], total(), app=app)) == 3
        wrong = chord([fail()], total(), app=app).apply_async()
        assert 'boom' in str(app.backend.wait_for(wrong.id, timeout=60, interval=0.01)['result'])


# The store's contract, live where CELERY_S3_TEST_URL names a bucket


@pytest.fixture
def live(request, monkeypatch):  # the settings of a folder in the live bucket, or in the stub
    if not LIVE_URL:
        request.getfixturevalue('store')
        yield {'bucket': 'results'}
        return

    url, sent = urlsplit(LIVE_URL), Mock(return_value=None)
    folder = f'celery-s3-{uuid.uuid4().hex}'
    noted = [*handlers.BUILTIN_HANDLERS, ('before-send', sent)]
    monkeypatch.setattr(handlers, 'BUILTIN_HANDLERS', noted)
    settings = dict(parse_qsl(url.query), bucket=url.netloc, base_path=f'{url.path}/{folder}')
    settings['conditional_writes'] = settings.get('conditional_writes') != 'False'
    yield settings
    for path in {urlsplit(call.kwargs['request'].url).path for call in sent.call_args_list}:
        make_bucket(**settings).delete(unquote(path).rpartition(f'{folder}/')[2])


def test_store_keeps_bytes_and_odd_keys_and_tells_what_is_wrong(live):
    keys = {'aws_access_key_id': os.getenv('AWS_ACCESS_KEY_ID'), 'aws_secret_access_key': 'wrong'}
    try:
        assert make_bucket(**live, **keys).get('key') is None  # it checks no signatures
    except ClientError as error:
        assert error.response['Error']['Code'] == 'SignatureDoesNotMatch'
    absent = make_bucket(**{**live, 'bucket': f'celery-s3-absent-{uuid.uuid4().hex}'})
    for use in absent.get, absent.delete, lambda key: absent.put_if(key, b'', None):
        pytest.raises(ClientError, use, 'key').match(f'NoSuchBucket.*{absent.uri}')
    bucket = make_bucket(**live)
    for value in b'', b'\x00\xff', os.urandom(3_000_000):
        bucket.put('key', value)
        assert bucket.get('key').value == value
    assert (bucket.delete('key'), bucket.delete('key'), bucket.get('key')) == (None, None, None)
    ids = [task_id for task_id in ODD_IDS if task_id not in EMPTY_SEGMENTS]
    for task_id in ids:
        bucket.put(TASK + task_id, task_id.encode())
    assert [bucket.get(TASK + task_id).value.decode() for task_id in ids] == ids


def test_store_never_overwrites_a_success(live):
    backends = [make_app(live).backend for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda backend: backend.store_result('id', 1, 'SUCCESS'), backends))
        list(threads.map(lambda backend: backend.store_result('id', 2, 'FAILURE'), backends))
    for state in 'STARTED', 'PROGRESS', 'SUCCESS', 'FAILURE':
        backends[0].store_result('other', state, state)
    assert backends[1].get_result('id') == 1
    assert backends[1].get_state('other') == 'SUCCESS'


def test_store_runs_chords(live):
    with working(make_app(live), pool='threads', concurrency=8) as app:
        chords = [chord([app.tasks['add'].s(number) for number in range(8)], app=app)] * 3
        results = [one(app.tasks['total'].s()) for one in chords]
        assert [result.get(timeout=60, interval=0.01) for result in results] == [28, 28, 28]
