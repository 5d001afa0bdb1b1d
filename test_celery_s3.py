"""The rules of celery_s3, each on the wire: what is sent, and what comes back. The last section
runs on `responses`; with CELERY_S3_TEST_URL='s3://bucket/prefix?endpoint_url=...', on that bucket.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import UserList
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import celery.exceptions
import pytest
import requests
import responses
from botocore import auth, awsrequest, credentials, exceptions, httpsession, session
from botocore.exceptions import ClientError, ConnectionClosedError
from celery import Celery, chord, group
from celery.backends.base import Context, KeyValueStoreBackend
from celery.contrib.testing.worker import start_worker
from celery.exceptions import BackendStoreError, Ignore, ImproperlyConfigured, NotRegistered
from celery.result import AsyncResult, EagerResult, GroupResult
from kombu.transport import memory
from kombu.utils.encoding import bytes_to_str

import celery_s3.backends
from celery_s3 import Bucket, S3Backend

LIVE_URL = os.environ.get('CELERY_S3_TEST_URL')
DROPPED = ConnectionClosedError(endpoint_url='dropped')
TASK, GROUP, CHORD = 'celery-task-meta-', 'celery-taskset-meta-', 'chord-unlock-'


# S3 on `responses`


def refusal(status, code, headers=None, message='No.'):
    body = f'<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return status, {'x-amz-request-id': 'R1', **(headers or {})}, body


def lost(answer):
    answer()
    raise DROPPED


class Sent(str):
    """A request, as 'METHOD key'; its URL, its headers and its body are attributes."""


class Store:
    """The bucket `results` in memory, which answers as S3 does."""

    def __init__(self):
        self.objects, self.faults, self.sent, self.made, self.sessions = {}, [], [], [], []
        self.etag_forms, self.gate, self.lock = ('quoted', 'bare'), None, threading.RLock()

    def fail_next(self, pattern, fault, times=1):
        """The next requests whose 'METHOD key' begins like the pattern meet a fault: an answer, an
        error, or a function, which is given one that answers as S3 does."""
        self.faults += [(pattern, fault)] * times

    def take_requests(self):
        taken = list(self.sent)
        self.sent.clear()
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
        with self.lock:
            self.sent.append(sent)
            found = next((one for one in self.faults if re.match(one[0], sent)), None)
            if found:
                self.faults.remove(found)

        def answer():
            with self.lock:
                return self.answer(request, bucket, key)

        fault = found[1] if found else lambda answer: answer()
        if isinstance(fault, Exception):
            raise fault
        return fault(answer) if callable(fault) else fault

    def answer(self, request, bucket, key):
        path = urlsplit(request.url).path
        if path != quote(unquote(path), '/-._~'):  # S3 signs what it would have encoded
            return refusal(403, 'SignatureDoesNotMatch')
        if bucket != 'results':
            return refusal(404, 'NoSuchBucket')
        if request.method == 'PUT':
            return self.put(key, request.body or b'', request.headers)
        if request.method == 'DELETE':
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

    def finish(self, task_id, result=None, status='SUCCESS'):
        """What a worker elsewhere stores."""
        meta = {'status': status, 'result': result, 'task_id': task_id, 'children': []}
        self.objects[f'{TASK}{task_id}'] = json.dumps(meta).encode()


class Clock:
    """Stands in for the module `time`: sleeping is free, recorded, and lets things happen."""

    def __init__(self):
        self.now, self.slept, self.events = 0.0, [], []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()

    def at(self, when, action, *args):
        self.events.append((when, lambda: action(*args)))
        self.events.sort(key=lambda event: event[0])


@pytest.fixture(autouse=True)
def clock(request, monkeypatch, tmp_path):
    """Nothing outside plays a part: no settings, no chance and, but for `real_time`, no time."""
    if LIVE_URL and 'live' in request.fixturenames:
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
    clock = Clock()
    if not request.node.get_closest_marker('real_time'):
        monkeypatch.setattr(celery_s3, 'time', clock)
    return clock


@pytest.fixture
def store(monkeypatch):
    """`responses` sees what `URLLib3Session` sends, and the stub answers."""
    store, make = Store(), httpsession.URLLib3Session.__init__

    def init(http, *args, **kwargs):
        if 'socket_options' in kwargs:  # botocore makes others to look up credentials
            store.made.append(kwargs)
        make(http, *args, **kwargs)

    def send(http, request):
        store.sessions.append(http)
        headers = {name: bytes_to_str(value) for name, value in request.headers.items()}
        outgoing = requests.Request(request.method, request.url, headers, data=request.body)
        outgoing = outgoing.prepare()
        outgoing.url = request.url  # which prepare() rids of dot segments
        try:
            answer = requests.adapters.HTTPAdapter().send(outgoing, stream=True)
        except ConnectionClosedError as error:  # it is in another one's context, as urllib3's are
            raise ConnectionClosedError(endpoint_url=request.url) from error
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


make_bucket = functools.partial(Bucket, bucket='results')


@pytest.fixture
def started(monkeypatch):  # the threads that were, of which `limit` can be
    start, started = threading.Thread.start, UserList()
    started.limit = 99

    def start_some(thread):
        if len(started) == started.limit:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, 'start', start_some)
    return started


def make_app(settings=None, backend='S3Backend', **conf):
    app = Celery('tests', broker='memory://', set_as_current=False)
    app.conf.update(
        result_backend=f'celery_s3.{backend}',
        CELERY_S3_BACKEND_SETTINGS={'bucket': 'results'} if settings is None else settings,
        broker_connection_retry_on_startup=True,
        broker_transport_options={'polling_interval': 0.005},
        worker_hijack_root_logger=False,
        **conf,
    )

    @app.task(name='add', shared=False)
    def add(*numbers):
        return sum(numbers)

    @app.task(name='fail', shared=False)
    def fail(*_):
        raise ValueError('boom')

    @app.task(name='total', shared=False)
    def total(results):
        return sum(total(one) if isinstance(one, list) else one for one in results)

    @app.task(name='retried', shared=False, bind=True)
    def retried(task, number):
        if not task.request.retries:
            raise task.retry(countdown=0)
        return number

    @app.task(name='replaced', shared=False, bind=True)
    def replaced(task, name):
        raise task.replace(group(add.s(1), app.tasks[name].s(2), app=app))

    app.task(name='ignored', shared=False, ignore_result=True)(add.run)
    return app


@contextlib.contextmanager
def working(app, **pool):  # a worker that ends within 2 * 0.05 seconds, not two times two
    memory.Channel.queues.clear()
    drain = memory.Transport.drain_events
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Transport, 'drain_events', lambda *args, **_: drain(*args, 0.05))
        with start_worker(app, shutdown_timeout=60, perform_ping_check=False, **pool):
            yield app


@pytest.fixture
def app():
    memory.Channel.queues.clear()
    return make_app()


# Errors


def test_exactly_transient_faults_are_safe_to_retry():
    def answered(status, code='Any'):
        answer = {'Error': {'Code': code}, 'ResponseMetadata': {'HTTPStatusCode': status}}
        return ClientError(answer, 'GET')

    def make(name):
        words = 'endpoint_url error proxy_url provider error_msg cred_var'.split()
        return getattr(exceptions, f'{name}Error')(**dict.fromkeys(words, 'x'))

    names = 'ConnectionClosed ConnectTimeout EndpointConnection ProxyConnection ReadTimeout SSL'
    names += ' NoCredentials CredentialRetrieval MetadataRetrieval'
    transient = [make(name) for name in names.split()]
    transient += [answered(status) for status in (409, 429, 500, 502, 503, 504)]  # 409: Ceph 20
    transient += [answered(400, code) for code in ('RequestTimeout', 'SlowDown', 'Throttling')]
    final = [answered(status) for status in (400, 403, 404, 412, 501)]
    final += [make('PartialCredentials'), make('HTTPClient'), answered(400, None)]
    final += [exceptions.SSLError(endpoint_url='e', error='CERTIFICATE_VERIFY_FAILED'), KeyError()]
    for error in transient + final:
        assert celery_s3.is_transient(error) is (error in transient)
        assert S3Backend.exception_safe_to_retry(error) is (error in transient)


# The verbs


def test_the_headers_go_with_every_put_and_nothing_else(store):
    bucket = make_bucket(headers={'x-amz-tagging': 'a=b'})
    bucket.put('key', b'')
    bucket.put_if('key', b'', store.etag('key'))
    bucket.put_if('new', b'', None)
    bucket.get('key')
    bucket.delete('key')
    assert [sent.headers.get('x-amz-tagging') for sent in store.sent] == ['a=b'] * 3 + [None] * 2


@pytest.mark.parametrize('forms', [('quoted', 'bare'), ('quoted',), ('bare',)])
def test_put_if_the_etag_is_this_in_whatever_form_the_store_wants_it(store, forms):
    store.etag_forms = forms
    bucket = make_bucket()
    _, etag = bucket.put_if('key', b'1', None)
    store.take_requests()
    assert bucket.put_if('key', b'lost', 'abc') == (b'1', etag)  # a genuine conflict
    assert store.take_requests() == ['PUT key', 'PUT key', 'GET key']
    found, new = bucket.put_if('key', b'2', etag)
    assert (found, new) == (b'2', store.etag('key'))
    assert len(store.take_requests()) == (2 if forms == ('bare',) else 1)
    bucket.put_if('key', b'3', new)
    assert store.take_requests() == ['PUT key']  # only the form that has succeeded
    for outdated in etag, None:
        assert bucket.put_if('key', b'4', outdated) == (b'3', store.etag('key'))
        assert store.take_requests() == ['PUT key', 'GET key']
    for unknown in 'abc', '':
        assert bucket.put_if('gone', b'x', unknown) == (None, None)
    store.fail_next('PUT', (412, {}, ''))
    assert bucket.put_if('key', b'5', None) == (b'3', store.etag('key'))
    for etag in None, 'abc':  # a wrong header surfaces as S3's own error
        store.fail_next('PUT', refusal(400, 'InvalidArgument'))
        with pytest.raises(ClientError, match='InvalidArgument'):
            bucket.put_if('key', b'', etag)


def test_all_who_run_something_share_max_connections_threads(started):
    bucket, three, running, most = make_bucket(max_connections=3), threading.Barrier(3), [], []

    def work(item):
        running.append(item)
        most.append(len(running))
        three.wait(60)  # breaks unless three run at once
        running.remove(item)
        return item.upper()

    assert [*bucket.run(str.upper, ['a']), *bucket.run(work, [])] == [('a', 'A')]
    assert not started  # for one item, or none
    with ThreadPoolExecutor(4) as callers:
        found = callers.map(lambda items: [*bucket.run(work, items)], ['abcdef'] * 4)
        assert [*found] == [[*zip('abcdef', 'ABCDEF')]] * 4
    assert (max(most), len(started) <= 4 + 3) == (3, True)


@pytest.mark.parametrize('limit', [0, 1, 5, 99])
def test_threads_may_be_few_and_need_no_semaphores(started, monkeypatch, limit):
    monkeypatch.delattr('_multiprocessing.SemLock')  # on AWS Lambda, it raises an OSError
    for name in [name for name in sys.modules if name.startswith('multiprocessing')]:
        monkeypatch.setitem(sys.modules, name, None)
    bucket, items, started.limit = make_bucket(), [*range(100)], limit
    for _ in range(2):
        assert [*bucket.run(str, items)] == [*zip(items, map(str, items))]
    assert len(started) <= min(limit, 50)


# The environment

AWS, MINE = 'https://results.s3.us-east-1.amazonaws.com/', 'https://mine:3/s3/'


@pytest.mark.parametrize(('settings', 'variables', 'root'), [
    ({}, {}, AWS),
    ({}, {'DEFAULT_REGION': 'eu-central-1'}, 'https://results.s3.eu-central-1.amazonaws.com/'),
    ({'aws_region': 'us-east-1'}, {'DEFAULT_REGION': 'eu-central-1'}, AWS),
    ({'aws_region': 'cn-north-1'}, {}, 'https://results.s3.cn-north-1.amazonaws.com.cn/'),
    ({'aws_region': 'us-iso-east-1'}, {}, 'https://results.s3.us-iso-east-1.c2s.ic.gov/'),
    ({'aws_region': 'moon-1'}, {}, 'https://results.s3.moon-1.amazonaws.com/'),
    ({'bucket': 'my.results'}, {}, 'https://s3.us-east-1.amazonaws.com/my.results/'),
    ({'bucket': 'My_Results'}, {}, 'https://s3.us-east-1.amazonaws.com/My_Results/'),
    ({'bucket': 'ap-s3alias'}, {}, 'https://ap-s3alias.s3.us-east-1.amazonaws.com/'),
    ({}, {'USE_FIPS_ENDPOINT': 'true', 'USE_DUALSTACK_ENDPOINT': 'true'},
     'https://results.s3-fips.dualstack.us-east-1.amazonaws.com/'),
    ({}, {'USE_DUALSTACK_ENDPOINT': 'true'}, AWS.replace('.s3.', '.s3.dualstack.')),
    ({}, {'ENDPOINT_URL': 'http://any:1'}, 'http://any:1/results/'),
    ({}, {'ENDPOINT_URL': 'http://any:1', 'ENDPOINT_URL_S3': MINE}, f'{MINE}results/'),
    ({'endpoint_url': MINE}, {'ENDPOINT_URL_S3': 'http://any:1'}, f'{MINE}results/'),
    ({'endpoint_url': 'http://[::1]:9000'}, {}, 'http://[::1]:9000/results/'),
    ({}, {'ENDPOINT_URL_S3': MINE, 'IGNORE_CONFIGURED_ENDPOINT_URLS': 'true'}, AWS),
    ({'base_path': '//a/box//'}, {}, f'{AWS}a/box/'),
])  # fmt: skip
def test_settings_and_environment_make_the_url(store, monkeypatch, settings, variables, root):
    for name in variables:
        monkeypatch.setenv(f'AWS_{name}', variables[name])
    store.fail_next('GET', (200, {'ETag': 'W/"as a proxy writes it"'}, 'x'))
    bucket = make_bucket(**settings)
    assert bucket.get('k') == (b'x', 'as a proxy writes it')
    region = settings.get('aws_region') or variables.get('DEFAULT_REGION') or 'us-east-1'
    assert store.sent[0].url == f'{root}k'
    assert f'/{region}/s3/' in store.sent[0].headers['Authorization']
    folder = settings.get('base_path', '').strip('/')
    assert bucket.uri == f's3://{settings.get("bucket", "results")}/{folder}{"/" * bool(folder)}'


def test_a_profile_says_region_keys_and_ca_bundle(store, tmp_path, monkeypatch):
    (tmp_path / 'config_file').write_text(
        '[profile worker]\nregion = sa-east-1\nca_bundle = /profile.pem\n'
        'aws_access_key_id = PROFILEKEY\naws_secret_access_key = x\n'
    )
    told = []  # STS is asked in the region that the session knows
    tell = 'botocore.session.Session.set_config_variable'
    monkeypatch.setattr(tell, lambda session, *variable: told.append(variable))
    make_bucket(aws_profile='worker').get('key')
    signed = store.sent[0].headers['Authorization']
    assert 'Credential=PROFILEKEY/' in signed and '/sa-east-1/s3/' in signed
    make_bucket(aws_profile='worker', aws_region='us-gov-west-1')
    assert told == [('region', 'sa-east-1'), ('region', 'us-gov-west-1')]
    assert store.made[-1]['verify'] == '/profile.pem'


def test_proxies_and_ca_bundles_come_from_the_environment(store, monkeypatch):
    make_bucket()
    monkeypatch.setenv('HTTPS_PROXY', 'http://proxy:3128')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/requests.pem')
    make_bucket()
    monkeypatch.setenv('AWS_CA_BUNDLE', '/aws.pem')
    monkeypatch.setenv('NO_PROXY', '.amazonaws.com')
    make_bucket(max_connections=1)
    assert [made['verify'] for made in store.made] == [True, '/requests.pem', '/aws.pem']
    assert [made['max_pool_connections'] for made in store.made] == [50, 50, 1]
    assert store.made[0]['socket_options'] == [(6, 1, 1)]  # TCP_NODELAY
    assert store.made[0].get('timeout', httpsession.DEFAULT_TIMEOUT) == 60
    assert [made['proxies'].get('https') for made in store.made] == [
        None,
        'http://proxy:3128',
        None,
    ]


EMPTY_SEGMENTS = ['a//b', '/lead', 'trail/']  # SeaweedFS and MinIO do not keep these
ODD_IDS = EMPTY_SEGMENTS + [
    'a b', 'a+b', '100%', 'a%2Fb', 'a?acl', 'a#b', 'a&b=c', '"quoted"', "it's", '<tag>', 'é', '☃',
    '𝄞', 'back\\slash', '~', 'a;b,c:d@e!f$g*h(i)', '...', 'a..b', '.x',
]  # fmt: skip
# Some stores and proxies resolve dot segments, or refuse control characters. S3 does neither.
ODDER_IDS = ['a/../b', '..', '../x', './x', 'x/.', 'a\nb', '\0', '\x1f', '\x7f', '\r\n', 42, 4.5]
ODDER_IDS += [uuid.UUID(int=7), b'bytes', ('a', 1)]


@pytest.mark.parametrize('task_id', ODD_IDS + ODDER_IDS)
def test_any_id_lands_at_exactly_its_key(store, app, task_id):
    app.backend.store_result(task_id, 'value', 'SUCCESS')
    assert list(store.objects) == [TASK + str(bytes_to_str(task_id))]
    assert app.backend.get_result(task_id) == 'value'
    app.backend.set('a\ud800', b'x')  # what has no UTF-8 is written as Python would write it
    assert (app.backend.get('a\ud800'), store.objects['a\\ud800']) == (b'x', b'x')


# Signing, and failures


def test_a_signature_to_the_letter(store, monkeypatch):
    now = datetime(2013, 5, 24)
    monkeypatch.setattr(auth, 'get_current_datetime', lambda: now, raising=False)
    before_1_40 = SimpleNamespace(datetime=SimpleNamespace(utcnow=lambda: now))
    monkeypatch.setattr(auth, 'datetime', before_1_40)
    headers = {'x-amz-storage-class': 'REDUCED_REDUNDANCY'}
    make_bucket(headers=headers).put('test$file.text', b'Welcome to Amazon S3.')
    headers = store.sent[0].headers
    assert headers['X-Amz-Date'] == '20130524T000000Z'
    assert headers['Authorization'] == (
        'AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, '
        'SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-storage-class, '
        'Signature=680d4b8aa6c4d8389afab1018c65aeb5252d12a316860e15cd3ce5d6d1672ad6'
    )
    assert not [name for name in headers if 'checksum' in name.lower()]


def test_each_attempt_is_signed_with_the_credentials_of_the_moment(store, clock, monkeypatch):
    def look_up(_):
        found.append(found.pop(0))
        if isinstance(found[-1], Exception):
            raise found[-1]
        return found[-1]

    found = [credentials.Credentials('OLD', 'x', 'token'), credentials.Credentials('NEW', 'x')]
    found.insert(0, exceptions.CredentialRetrievalError(provider='role', error_msg='busy'))
    found.insert(1, exceptions.MetadataRetrievalError(error_msg='busy'))
    found.insert(2, None)  # those that are missing for a moment are waited for
    monkeypatch.setattr(session.Session, 'get_credentials', look_up)
    store.fail_next('PUT', refusal(503, 'SlowDown'))
    make_bucket().put('key', b'')
    assert clock.slept == [0.2, 0.4, 0.8, 8]
    first, second = (sent.headers for sent in store.sent)
    assert ('OLD' in first['Authorization'], first['X-Amz-Security-Token']) == (True, 'token')
    assert 'NEW' in second['Authorization'] and 'X-Amz-Security-Token' not in second


def test_credentials_are_looked_up_by_one_thread_at_a_time(store, app, monkeypatch):
    def meet(one):
        looking.append(one)
        time.sleep(0.01)
        assert looking.pop() is one and not looking
        return look_up(one)

    look_up, looking = session.Session.get_credentials, []
    monkeypatch.setattr(session.Session, 'get_credentials', meet)
    assert len(app.backend.mget([*'abcdefgh'])) == 8


ERROR, ALL = '<?xml version="1.0"?><Error><Code>Internal</Code></Error>', 'DELETE GET PUT'


@pytest.mark.parametrize(('fault', 'why', 'methods'), [
    (refusal(503, 'SlowDown'), 'SlowDown', ALL), (DROPPED, 'ConnectionClosedError', ALL),
    (refusal(400, 'Throttling'), 'Throttling', 'GET'), ((500, {}, ''), '500', 'GET'),
    ((503, {}, '<html>busy</html>'), '503', 'PUT'), ((200, {}, ERROR), 'Internal', 'PUT'),
    ((200, {'Content-Length': '9'}, 'half'), 'ConnectionClosedError', 'GET'),
])  # fmt: skip
def test_what_may_pass_is_tried_again_and_logged(store, clock, caplog, fault, why, methods):
    bucket = make_bucket(base_path='box')
    verbs = {'GET': bucket.get, 'DELETE': bucket.delete, 'PUT': lambda key: bucket.put(key, b'x')}
    # Full jitter's longest: a store that answers is given more time than a connection.
    pauses = [0.2, 0.4, 0.8, 1.6] if why == 'ConnectionClosedError' else [1, 2, 4, 8]
    for method in methods.split():
        caplog.clear()
        store.fail_next(method, fault, times=4)
        verbs[method]('key')
        assert store.take_requests() == [f'{method} box/key'] * 5
        assert [(one.levelname, one.getMessage()) for one in caplog.records if one.args] == [
            ('WARNING', f'{method} s3://results/box/key: {why}; attempt {number} in {pause:.1f} s')
            for number, pause in enumerate(pauses, 2)
        ]
    assert clock.slept == pauses * len(methods.split())


@pytest.mark.parametrize('given', [0, 1, 12, -1, 5000])
def test_aws_max_attempts_says_how_often_to_try(clock, monkeypatch, given):
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', str(given))
    monkeypatch.setattr(random, 'uniform', lambda low, high: low + (high - low) / 4)
    monkeypatch.setattr(session.Session, 'get_credentials', lambda _: None)
    with pytest.raises(exceptions.NoCredentialsError):
        make_bucket().get('key')
    jittered = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *[5] * 5000]  # of at most 20 seconds
    assert clock.slept == pytest.approx(jittered[: max(given or 5, 1) - 1])


def test_what_strikes_inside_a_request_is_not_wrapped_and_ends_it(store):
    store.fail_next('PUT', exceptions.HTTPClientError(error=Ignore('now')))  # by URLLib3Session
    with pytest.raises(Ignore, match='now'):
        make_bucket().put('key', b'x')


IRELAND = {'x-amz-bucket-region': 'eu-west-1'}
BOTH_REGIONS = 'region us-east-1, x-amz-bucket-region eu-west-1'


@pytest.mark.parametrize(('answer', 'said'), [
    (refusal(400, 'InvalidTag', message='The tag is bad'),
     r'^An error occurred \(InvalidTag\) when calling the GET s3://results/key \(HTTP 400, region '
     r'us-east-1, x-amz-request-id R1\) operation: The tag is bad$'),
    (refusal(301, 'PermanentRedirect', IRELAND), f'HTTP 301, {BOTH_REGIONS}, x-amz-request-id R1'),
    (refusal(400, 'AuthorizationHeaderMalformed', IRELAND), f'HTTP 400, {BOTH_REGIONS}'),
    ((300, {}, ''), r'\(HTTP 300, region us-east-1\)'),  # and not of S3
    ((404, {}, ''), 'HTTP 404'), ((400, {}, '<Error/>'), r'\(400\) when calling'),
    ((404, {}, '<html>not found</html>'), 'HTTP 404'), (refusal(403, 'AccessDenied'), 'HTTP 403'),
])  # fmt: skip
def test_an_error_tells_what_s3_said(store, answer, said):
    store.fail_next('GET', answer)
    with pytest.raises(ClientError, match=said) as error:
        make_bucket().get('key')
    assert error.value.response['ResponseMetadata']['HTTPStatusCode'] == answer[0]
    assert store.sent == ['GET key']


def test_a_denied_read_is_a_missing_key_where_that_is_set(store):
    bucket = make_bucket(denied_is_missing=True)
    store.fail_next('', refusal(403, 'AccessDenied'), times=2)
    assert bucket.get('key') == (None, None)
    with pytest.raises(ClientError, match='AccessDenied'):
        bucket.put('key', b'')
    store.fail_next('GET', refusal(403, 'InvalidAccessKeyId'))
    with pytest.raises(ClientError, match='InvalidAccessKeyId'):
        bucket.get('key')


SECRET, TOKEN = 'never/shown/ANYWHERE', 'AQoDYXdzEXAMPLETOKEN'
KEYS = {'aws_access_key_id': 'AKID', 'aws_secret_access_key': SECRET, 'aws_session_token': TOKEN}
REPEATED = f'<Error><CanonicalRequest>x-amz-security-token:{TOKEN}</CanonicalRequest></Error>'


def show(error, log):  # all that error trackers send of it, but the frame of the test
    parts = type(error.value), error.value, error.tb.tb_next
    lines = traceback.TracebackException(*parts, capture_locals=True).format()
    return ''.join(lines) + repr(vars(error.value)) + log.text


@pytest.mark.parametrize('fault', [
    (403, {}, REPEATED), (200, {'Content-Length': '9'}, ''), refusal(403, 'AccessDenied'),
    refusal(503, 'SlowDown'), DROPPED,
])  # fmt: skip
@pytest.mark.parametrize('end', [None, '', '\n'])  # in settings; in the environment, with an end
def test_no_failed_request_shows_a_secret(store, caplog, monkeypatch, fault, end):
    caplog.set_level(logging.DEBUG, 'celery_s3')
    for name in KEYS if end is not None else ():
        monkeypatch.setenv(name.upper(), f'{KEYS[name]}{end}')
    store.fail_next('GET', fault, times=5)
    backend = make_app({'bucket': 'results', **(KEYS if end is None else {})}).backend
    with pytest.raises((ClientError, exceptions.BotoCoreError)) as error:
        backend.get('key')
    assert not re.search(f'{SECRET}|{TOKEN}', show(error, caplog))
    assert all(sent.headers['X-Amz-Security-Token'] == TOKEN for sent in store.sent)
    shown = [backend, backend.bucket, backend.as_uri(True), pickle.dumps(backend)]
    assert not re.search(f'{SECRET}|{TOKEN}', ' '.join(map(repr, shown)))


@pytest.mark.parametrize('wrong', [
    {'aws_secret_acces_key': SECRET}, {'aws_secret_access_key': f'{SECRET}\n'}, {'bucket': ''},
    {'aws_secret_access_key': [SECRET]}, {'aws_session_token': f'{TOKEN}\n'},
    {'aws_access_key_id': None}, {'aws_profile': 'absent'}, {'max_connections': 'x'},
    {'headers': {'x-amz-meta-a': f'{SECRET}\n'}},
])  # fmt: skip
def test_no_wrong_setting_shows_a_secret(caplog, wrong):
    settings = {'bucket': 'results', **KEYS, **wrong}
    app = make_app(settings)
    with pytest.raises(ImproperlyConfigured) as error:
        assert app.backend
    with pytest.raises((TypeError, ValueError, exceptions.BotoCoreError)) as direct:
        Bucket(**settings)
    assert not re.search(f'{SECRET}|{TOKEN}', show(direct, caplog))
    assert not re.search(f'{SECRET}|{TOKEN}|EXAMPLEKEY', show(error, caplog))  # the environment's


# S3KeyValueBackend


@pytest.mark.parametrize('style', ['CELERY_', 'lower', 'namespace'])
@pytest.mark.parametrize('unset', [None, ''])
def test_settings_are_found_whatever_their_style(style, unset):
    app, settings = Celery(set_as_current=False), dict.fromkeys(Bucket.__annotations__, unset)
    settings |= {'bucket': 'results', 'base_path': 'celery'}
    conf = {'result_backend': 'celery_s3.S3Backend', 's3_backend_settings': settings}
    if style != 'lower':
        conf = {'CELERY_RESULT_BACKEND': 'celery_s3.backends.S3Backend'}  # as in celery-s3 1.x
        conf['CELERY_S3_BACKEND_SETTINGS'] = settings
    app.config_from_object(conf, namespace='CELERY' if style == 'namespace' else None)
    assert type(app.backend) is S3Backend
    assert app.backend.as_uri() == app.backend.as_uri(True) == 's3://results/celery/'
    bucket = app.backend.bucket
    assert (bucket.max_connections, bucket.headers) == (50, {})
    assert (bucket.conditional_writes, bucket.denied_is_missing) == (True, False)
    assert celery_s3.backends is celery_s3


WRONG = {
    'bucket': [*'b/ s3://b arn:aws:s3:::b b#x b?x=y b%2f . .. é b--use1-az4--x-s3'.split(),
        '', None, 1, ' b', 'b\n', 'b' * 256],
    'base_path': [1, '.', './x', 'a/../x/', '/..', 'a\n', '\0', '\x7f'],
    'aws_region': [1, 'us-east-1 ', 'us-east-1\n', 'a.b', 'a/b', 'é', 'r' * 64],
    'aws_access_key_id': [1, ' A', 'A\n', 'é', ''], 'aws_secret_access_key': [1, ' S', 'S\n'],
    'aws_session_token': [1, 'T ', 'T\r', 'T\nx'],
    'endpoint_url': [*'localhost:9000 ftp://h http:// http://a:b@h http://h/?x=y http://h?x'.split(),
        1, 'http://h/#f', 'http://h /', 'http://h\n', 'http://h:', 'http://h:x', 'http://é'],
    'headers': ['x-amz-acl', ['x-amz-acl'], {'x-a': True}, {'x-é': ''}, {'x-a\n': ''}, {5: ''},
        {'x-a': 'a\nb'}, {'x-a': 'é'}, {'x-a': ' a'}],
    'conditional_writes': ['False', 0], 'denied_is_missing': ['True', 1],
    'max_connections': ['7', True, False, 0, -1, 1.5],
}  # fmt: skip
WRONG_TOGETHER = [
    ({}, {}, 'bucket must be'),
    (['bucket'], {}, 'must be a mapping'),
    ({'bucket': 'b', 'buckt': 'x'}, {}, "unknown setting 'buckt'; known are bucket, base_path, a"),
    ({'bucket': 'b', 'region': None}, {}, "unknown setting 'region'; known are bucket, base_path"),
    ({'bucket': 'b', 'aws_secret_access_key': 'S'}, {}, 'aws_secret_access_key go together'),
    ({'bucket': 'b', 'aws_session_token': 'T'}, {}, 'aws_access_key_id and'),
    ({'bucket': 'b', 'aws_profile': 'absent'}, {}, r'profile \(absent\) could not be found'),
    ({'bucket': 'b'}, {'AWS_DEFAULT_REGION': 'us-east-1\n'}, 'aws_region must be'),
    ({'bucket': 'b'}, {'AWS_ENDPOINT_URL': 'http://h/?tenant=x'}, 'endpoint_url must be'),
]  # fmt: skip
RIGHT = {'bucket': 'b', 'aws_access_key_id': 'A', 'aws_secret_access_key': 'S'}
ALONE = [({**RIGHT, name: one}, {}, f'{name} ') for name in WRONG for one in WRONG[name]]


@pytest.mark.parametrize(('settings', 'variables', 'problem'), WRONG_TOGETHER + ALONE)
def test_a_wrong_setting_is_named_at_once(store, monkeypatch, settings, variables, problem):
    for name in variables:
        monkeypatch.setenv(name, variables[name])
    with pytest.raises(ImproperlyConfigured, match=f'^CELERY_S3_BACKEND_SETTINGS: .*{problem}'):
        assert make_app(settings).backend
    assert not store.sent


def test_making_a_backend_sends_nothing_and_imports_no_boto3(store, app, started):
    assert app.backend.thread_safe  # else Celery makes one for each thread
    assert not store.sent and not started
    program = 'import celery_s3, sys; sys.exit("boto3" in sys.modules)'
    folder = os.path.dirname(celery_s3.__file__)
    assert subprocess.run([sys.executable, '-c', program], cwd=folder).returncode == 0


@pytest.mark.parametrize('value', ['text', 'é', b'\x80bytes', b'', b'x' * 5_000_000, ERROR])
def test_values_come_back_as_bytes(store, app, value):
    app.backend.set(b'key', value)
    assert app.backend.get(b'key') == (value.encode() if isinstance(value, str) else value)
    app.backend.set('key', b'other')
    assert app.backend.bucket.get('key') == (b'other', store.etag('key'))
    assert app.backend.mget(['key', 'none']) == {'key': b'other', 'none': None}
    app.backend.delete(b'key')
    assert app.backend.bucket.get('key') == (None, None)
    store.fail_next('DELETE', refusal(404, 'NoSuchKey'))  # as some stores answer
    app.backend.delete('key')
    methods = [request.split()[0] for request in store.take_requests()]
    assert methods == ['PUT', 'GET', 'PUT', 'GET', 'GET', 'GET', 'DELETE', 'GET', 'DELETE']


def test_poll_store_fetch_and_forget_cost_one_request_each(store):
    app = make_app(result_compression='gzip')
    result = AsyncResult('id', app=app)
    assert result.state == 'PENDING'
    app.backend.store_result('id', 'x' * 10_000, 'SUCCESS')
    assert len(store.objects[f'{TASK}id']) < 1000 or celery.VERSION < (5, 7)
    assert result.get() == 'x' * 10_000
    result.forget()
    assert store.sent == [f'{method} {TASK}id' for method in ('GET', 'PUT', 'GET', 'DELETE')]
    assert store.objects == {}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_fork_shares_neither_connections_nor_locks(store, app, monkeypatch):
    def fork(_):  # under the lock
        child = os.fork()
        if not child:
            patch.undo()
            worker = threading.Thread(target=app.backend.mget, args=[['a', 'b']], daemon=True)
            worker.start()
            worker.join(60)
            os._exit(store.sessions[-1] is parent or worker.is_alive())
        assert os.waitpid(child, 0)[1] == 0

    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
    app.backend.mget(['a', 'b'])
    parent = store.sessions[-1]
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, 'get_credentials', fork)
        with pytest.raises(exceptions.NoCredentialsError):
            app.backend.get('a')
    app.backend.get('a')
    assert store.sessions[-1] is parent


ROOMS = [celery_s3.S3ChordBackend, celery_s3.S3WaitingBackend, celery_s3.S3StoringBackend]


@pytest.mark.parametrize('room', [*ROOMS, celery_s3.S3KeyValueBackend])
def test_each_method_overrides_one_of_celerys(room):
    names = {name for name in vars(room) if name[0] != '_'} - {'bucket'}
    names |= {'_store_result', '_fail_chain'} & vars(room).keys()
    if celery.VERSION < (5, 7):
        names -= {'_fail_chain', 'supports_result_compression'}
    for name in names:
        both = getattr(room, name), getattr(KeyValueStoreBackend, name)
        if callable(both[0]) and name not in ('key_t', 'exception_safe_to_retry'):
            ours, theirs = (inspect.signature(one).parameters.values() for one in both)
            assert [(one.name, one.kind, one.default) for one in ours] == [
                (one.name, one.kind, one.default) for one in theirs
            ]


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


LATE = {'exc_type': 'ValueError', 'exc_message': 'late', 'exc_module': 'builtins'}


@pytest.mark.parametrize('state', ['STARTED', 'RETRY', 'FAILURE', 'REVOKED', 'SUCCESS'])
@pytest.mark.parametrize('writer', ['the same', 'another', 'one that stored STARTED before'])
def test_nothing_replaces_a_success(store, app, state, writer):
    request, late = Context(id='id'), Context(id='id')
    backend = app.backend if writer == 'the same' else make_app().backend
    if writer == 'one that stored STARTED before':
        backend.store_result('id', None, 'STARTED', request=late)
    app.backend.store_result('id', 'right', 'SUCCESS', request=request)
    for _ in range(2):
        store.take_requests()
        backend.store_result('id', LATE, state, request=request if writer == 'the same' else late)
        methods = [name.split()[0] for name in store.take_requests()]
        assert methods in (['PUT', 'GET'], ['PUT', 'PUT', 'GET'])
    assert backend.get_result('id') == 'right'


@pytest.mark.parametrize('state', ['STARTED', 'RETRY', 'FAILURE', 'REVOKED'])
@pytest.mark.parametrize('later', ['STARTED', 'SUCCESS'])
def test_any_other_state_is_replaced(store, app, state, later):
    app.backend.store_result('id', LATE, state)
    other = make_app().backend
    store.take_requests()
    other.store_result('id', 'right', later)
    assert store.take_requests() == [f'PUT {TASK}id', f'GET {TASK}id', f'PUT {TASK}id']
    assert app.backend.get_result('id') == 'right'


@pytest.mark.parametrize('sequence', ['SUCCESS', 'STARTED SUCCESS', 'STARTED PROGRESS FAILURE'])
def test_an_answer_lost_after_the_write_ends_in_the_right_state(store, app, sequence):
    request = Context(id='id')
    for state in sequence.split():
        store.fail_next('PUT', lost)
        app.backend.store_result('id', LATE, state, request=request)
        assert app.backend.get_state('id') == state
    app.backend.store_result('id', 'next', 'PROGRESS', request=request)
    assert app.backend.get_state('id') == ('SUCCESS' if state == 'SUCCESS' else 'PROGRESS')


@pytest.mark.parametrize(('conflicts', 'ends'), [(37, 'SUCCESS'), (39, 'PROGRESS')])
def test_others_who_never_stop_writing_are_an_error(store, app, conflicts, ends):
    store.finish('id', status='PROGRESS')
    store.fail_next('PUT', refusal(412, 'PreconditionFailed'), times=conflicts)
    problem = pytest.raises(BackendStoreError, match='others store .*s3:GetObject')
    with contextlib.nullcontext() if ends == 'SUCCESS' else problem as error:
        app.backend.store_result('id', 1, 'SUCCESS')
    assert not error or (error.value.state, error.value.task_id) == ('SUCCESS', 'id')
    store.faults.clear()
    assert app.backend.get_state('id') == ends


@pytest.mark.parametrize('state', ['STARTED', 'PROGRESS', 'RETRY'])
def test_a_state_that_is_not_final_gives_way_when_it_loses_twice(store, app, state):
    def write_after(answer):
        found = answer()
        store.finish('id', f'{len(store.sent)} others', 'PENDING')
        return found

    store.finish('id', 'others', 'PENDING')
    store.fail_next('GET', write_after, times=99)
    assert app.backend.store_result('id', LATE, state, request=Context(id='child')) == LATE
    assert store.sent.count(f'PUT {TASK}id') <= 4
    assert app.backend.get_state('id') == 'PENDING'


@pytest.mark.parametrize('name', ['S3Backend', 'S3KeyValueBackend'])
def test_without_conditional_writes_celery_reads_before_it_writes_and_chords_poll(store, name):
    app = make_app({'bucket': 'results', 'conditional_writes': False}, name)
    for state, result in ('STARTED', None), ('SUCCESS', 'right'), ('FAILURE', LATE):
        app.backend.store_result('id', result, state)
    assert store.take_requests() == [f'GET {TASK}id', f'PUT {TASK}id'] * 2 + [f'GET {TASK}id']
    assert app.backend.get_result('id') == 'right'
    chord([app.tasks['add'].s(1).set(task_id='a')], app=app)(app.tasks['total'].s())
    (_, _, part), (unlock, _, _) = sorted(take_messages(app), key=lambda message: message[0])
    assert unlock == 'celery.chord_unlock'
    part.ignore_result = name == 'S3Backend'
    app.backend.mark_as_done('a', 1, part)
    assert store.sent == [f'GET {TASK}id', f'GET {TASK}a', f'PUT {TASK}a']
    assert not [sent for sent in store.sent if {'If-Match', 'If-None-Match'} & set(sent.headers)]


# Waiting, on a clock that jumps


def results_of(app, *task_ids):
    return GroupResult('g', [AsyncResult(task_id, app=app) for task_id in task_ids], app=app)


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
    clock.sleep(0)
    results = results_of(app, *map(str, range(-stuck, len(ends))))
    found = results.iter_native(timeout=9999)
    assert sorted(next(found)[1]['result'] for _ in ends) == [*range(len(ends))]
    assert ends[-1] <= clock.now <= ends[-1] + late
    assert len(store.sent) <= most
    assert stuck or results.join(timeout=0) == [*range(len(ends))]


def test_an_interval_of_the_callers_own_is_kept(store, app, clock):
    seen = []
    clock.at(500, store.finish, 'id', 42)
    app.backend.wait_for('id', 999, 5, on_interval=lambda: seen.append(len(store.sent)))
    assert (clock.slept, seen) == ([5] * 100, [*range(1, 101)])  # after a pause, before a look


def test_a_join_asks_for_up_to_max_connections_at_a_time(store):
    app = make_app({'bucket': 'results', 'max_connections': 8})
    waves = iter([one for size in (1, 3, 8) for one in [threading.Barrier(size)] * size])
    store.gate = lambda sent: next(waves).wait(60)  # breaks unless a wave is on its way at once
    for number in range(12):
        store.finish(str(number), number)
    assert results_of(app, *map(str, range(12))).get(timeout=9) == [*range(12)]


def test_an_interrupted_join_waits_for_no_request(store, app):
    answered, struck, main = threading.Event(), threading.Event(), threading.main_thread().ident

    def strike(*_):
        if not struck.is_set():
            struck.set()
            raise KeyboardInterrupt

    def interrupt(sent):
        # Until the join waits, Python may swallow it. Who is about to wait may sleep through it.
        while sent == f'GET {TASK}1' and not struck.wait(0.01):
            if sys._current_frames()[main].f_back.f_code.co_name in ('result', '__call__'):
                signal.pthread_kill(main, signal.SIGINT)
        return sent == f'GET {TASK}0' or answered.wait(60)

    for number in range(9):
        store.finish(str(number), number)
    store.gate = interrupt
    before = signal.signal(signal.SIGINT, strike)  # ignored, in a background job of a shell
    try:
        with pytest.raises(KeyboardInterrupt):
            results_of(app, *map(str, range(9))).get(timeout=9)
        assert not answered.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        answered.set()


@pytest.mark.parametrize('timeout', [0, 0.3, 7, 100])
@pytest.mark.parametrize('slow', [0, 5])  # seconds that a request takes
def test_a_timeout_is_on_time_and_keeps_nothing_back(store, app, clock, timeout, slow):
    pending, ready = ([f'{name}{number}' for number in range(9)] for name in ('p', 'r'))
    for task_id in ready:
        clock.at(0 if slow else timeout, store.finish, task_id)
    clock.sleep(0)
    store.gate = lambda sent: clock.sleep(slow) if slow else None
    found = results_of(app, *pending, *ready).iter_native(timeout=timeout)
    assert {next(found)[0] for _ in ready} == {*ready}
    with pytest.raises(celery.exceptions.TimeoutError, match=f'timed out .{timeout}'):
        next(found)
    assert slow or clock.now == timeout
    assert results_of(app, *ready).get(timeout=0) == [None] * 9


def test_a_timeout_holds_for_inner_groups_and_nobody_is_asked_twice(store, app, clock):
    inner = results_of(app, 'pending', 'ready too')
    group = GroupResult('outer', [AsyncResult('ready', app=app), inner], app=app)
    for task_id in 'ready', 'ready too':
        store.finish(task_id, task_id)
    with pytest.raises(celery.exceptions.TimeoutError):
        group.get(timeout=2)
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
    results = [*results_of(app, *ids), EagerResult('b', 7, 'SUCCESS')]
    assert app.ResultSet(results, app=app).get(timeout=0) == [0, 1, 7]
    with pytest.raises(ValueError, match=r'twice.*join\(\)'):
        results_of(app, 'a', 'a').get(timeout=0)
    assert results_of(app, 'a', 'a').join(timeout=0) == [1, 1]


def test_on_message_max_iterations_and_the_cache_are_as_in_celery(store, clock):
    app, messages = make_app(result_cache_max=10), []
    store.finish('a')
    store.finish('b', LATE, status='FAILURE')
    found = app.backend.get_many([*'pqrs', b'a', 'b'], None, 1, True, messages.append, None, 2)
    assert {task_id for task_id, _ in found} == {'a', 'b'}
    assert {meta['task_id'] for meta in messages} == {'a', 'b'}
    assert clock.slept == [1, 1]
    with pytest.raises(ValueError, match='late'):
        AsyncResult('b', app=app).get(timeout=0)
    store.finish('b', 42)  # a task may be tried again; a SUCCESS stays
    assert app.backend.is_cached('a') and AsyncResult('b', app=app).get(timeout=0) == 42
    assert [len([*app.backend.get_many(ids, max_iterations=0)]) for ids in ('', 'a')] == [0, 1]


# Chords


def take_messages(app):
    """Takes the messages off the queue: (task name, args, the request as the worker sees it)."""
    taken = []
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue('celery')
        while queue.qsize():
            message = queue.get(block=False)
            message.ack()
            args, _, embed = message.payload
            taken.append((message.headers['task'], args, Context(message.headers, **embed)))
    return taken


def begin(app, *ids):
    """Applies a chord of parts with these ids: their requests, its result, its id."""
    add, total = app.tasks['add'], app.tasks['total']
    header = [add.s(number).set(task_id=task_id) for number, task_id in enumerate(ids)]
    result = chord(header, app=app)(total.s())
    parts = [request for name, _, request in take_messages(app) if name == 'add']
    return parts, result, f'{result.parent.id}.{ids[-1]}'


def finish(app, part, value=1):
    app.backend.mark_as_done(part.id, value, part)


def bodies(app):
    return [args for name, args, _ in take_messages(app) if name == 'total']


def left_behind(store, *task_ids):
    return set(store.objects) - {f'{TASK}{task_id}' for task_id in task_ids}


def test_the_note_and_the_log_say_who_goes_on(store, app, caplog):
    caplog.set_level(logging.DEBUG, 'celery_s3')
    parts, _, chord_id = begin(app, 'a', 'b', 'c')
    note, etags = f'{CHORD}{chord_id}', [None]
    assert store.sent == [f'PUT {note}', f'PUT {GROUP}{chord_id}']
    assert store.sent[0].headers['If-None-Match'] == '*'
    for part in parts[0], parts[2], parts[1]:
        etags.append(f'"{store.etag(note)}"')
        finish(app, part)
    sent = [one for one in store.sent if one == f'PUT {note}']
    assert [one.headers.get('If-Match') for one in sent] == [None, *etags[2:]]
    written = [json.loads(one.body) for one in sent]
    nonce = str(uuid.UUID(written[2]['sender']))
    assert written == [{'next': ['c']}, {'next': ['c', 'b']}, {'next': ['b'], 'sender': nonce}]
    assert bodies(app) == [[[1, 1, 1]]]
    assert not left_behind(store, *'abc')
    lines = [one.getMessage() for one in caplog.records if one.levelname == 'DEBUG' and one.args]
    said = ['begun, c goes on', "a leaves it to ['c']", 'c writes b', 'b writes b']
    assert [line.split(': ')[1][: len(one)] for line, one in zip(lines, said, strict=True)] == said


@pytest.mark.parametrize(('size', 'order', 'most'), [
    (100, 'in order', 3), (20, 'any', 5), (100, 'any', 5), (100, 'last first', 5),
])  # fmt: skip
def test_what_a_part_costs(store, app, monkeypatch, size, order, most):
    dice, ids = random.Random(size), [str(number) for number in range(size)]
    monkeypatch.setattr(random, 'shuffle', dice.shuffle)
    for _ in range(2):
        store.objects.clear()
        parts, *_ = begin(app, *ids)
        if order == 'any':
            dice.shuffle(parts)
        elif order == 'last first':
            parts.insert(0, parts.pop())
        for part in parts:
            finish(app, part, int(part.id))
        assert bodies(app) == [[[*range(size)]]]
    assert not left_behind(store, *ids)
    # Also the note and the record, each written, read by the last part and deleted; its claim.
    assert len(store.sent) / 2 <= most * size + 6


@pytest.mark.parametrize('sign', ['the record goes', 'the body begins', None])
@pytest.mark.parametrize('when', [0, 20])
def test_a_second_delivery_sends_if_the_first_is_dead(store, app, clock, caplog, sign, when):
    caplog.set_level(logging.INFO, 'celery_s3')
    [part], result, chord_id = begin(app, 'a')
    store.objects[f'{CHORD}{chord_id}'] = b'{"next": ["a"], "sender": "nonce"}'
    if sign == 'the record goes':
        clock.at(when, store.objects.pop, f'{GROUP}{chord_id}')
    elif sign == 'the body begins':
        clock.at(when, store.finish, result.id, None, 'STARTED')
    clock.sleep(0)
    finish(app, part, 5)
    assert clock.slept == ([0] if sign and not when else [0, 30])
    waits = [line.getMessage() for line in caplog.records if line.levelname == 'INFO']
    assert waits == [f'chord {chord_id}: a waits 30 s'] * (len(clock.slept) - 1)
    assert bodies(app) == ([] if sign else [[[5]]])
    assert app.backend.get_state(result.id) in ('PENDING', 'STARTED')  # no error


@pytest.mark.parametrize('meanwhile', ['it ends unseen', 'it ends', 'others write', 'lost'])
def test_what_happens_meanwhile_is_noticed(store, app, meanwhile):
    def act(answer):
        if meanwhile == 'others write':
            store.objects[f'{CHORD}{chord_id}'] = b'{"next": ["b"], "sender": "another delivery"}'
            return answer()
        found = answer()
        store.finish(
            'a', 4
        )  # but not its delivery, which reads the note before this one writes it
        return found

    (first, a, *others, b), _, chord_id = begin(app, *'1a23b')
    for part in first, *others:
        finish(app, part)
    if not meanwhile.startswith('it ends'):
        store.finish('a', 4)
    at = f'GET {TASK}a' if meanwhile == 'it ends unseen' else f'PUT {CHORD}{chord_id}'
    store.fail_next(at, lost if meanwhile == 'lost' else act)
    finish(app, b, 5)
    assert bodies(app) == ([] if meanwhile == 'others write' else [[[1, 4, 1, 1, 5]]])
    finish(app, a, 4)
    assert not bodies(app)


@pytest.mark.parametrize(('part', 'record', 'said'), [
    (LATE, 'kept', "Dependency a raised ValueError('late'"),
    ({'exc_type': 'CancelledError', 'exc_module': 'asyncio.exceptions'}, 'kept',
     'Dependency a raised CancelledError('),
    ('no error, so that none can decode it', 'kept', 'Dependency a raised '),
    (None, 'kept', "Callback error: OSError('away for 20 s'"),
    (None, 'lost', ' no longer exists'),
    (None, b'{"result": 5}', 'Cannot restore group: '),
])  # fmt: skip
def test_a_body_that_is_not_sent_fails_once(store, app, monkeypatch, caplog, part, record, said):
    def refuse(*args, retry, retry_policy, **options):  # tries are a second apart
        assert celery_s3.CHORD_ID not in options
        raise OSError(f'away for {retry * retry_policy["max_retries"]} s')

    parts, result, chord_id = begin(app, 'a', 'b')
    store.finish('a', part, 'REVOKED' if part else 'SUCCESS')
    if record != 'kept':
        del store.objects[f'{GROUP}{chord_id}']
    if isinstance(record, bytes):
        store.objects[f'{GROUP}{chord_id}'] = record
    monkeypatch.setattr(app.amqp, 'send_task_message', refuse)
    for delivery in parts[1], Context(vars(parts[1])):
        finish(app, delivery)
    assert said in str(AsyncResult(result.id, app=app).result)
    assert store.sent.count(f'PUT {TASK}{result.id}') == 1
    assert left_behind(store, 'a', 'b') == {f'{TASK}{result.id}'}
    [line] = [one.getMessage() for one in caplog.records if one.levelname == 'ERROR']
    assert chord_id in line and said in line


def test_a_chord_ends_though_broker_and_store_refuse_something(store, app, monkeypatch, caplog):
    slept, effects = [], [celery.exceptions.OperationalError()] * 3 + [DEFAULT]
    monkeypatch.setattr('kombu.utils.functional.sleep', slept.append)
    [part], *_ = begin(app, 'a')
    send = Mock(wraps=app.amqp.send_task_message, side_effect=effects)
    monkeypatch.setattr(app.amqp, 'send_task_message', send)
    store.fail_next('DELETE', refusal(403, 'AccessDenied'), times=9)
    finish(app, part)
    assert (len(bodies(app)), sum(slept)) == (1, 2 + 4 + 6)
    [line] = [one for one in caplog.records if one.levelname == 'ERROR']
    assert 'is not deleted' in line.getMessage() and 'AccessDenied' in str(line.exc_info[1])


def test_ids_and_nesting_are_whatever_celery_takes_and_the_users_group_stays(store, app):
    (a, b), number = results_of(app, 'a', 'b'), uuid.UUID(int=7)
    inner = GroupResult('inner', [b, results_of(app, number)], app=app)
    header = GroupResult('header', [a, inner, a], app=app)
    body = app.tasks['total'].s()
    for value, task_id in enumerate(['a', 'b', number]):
        app.backend.apply_chord(('header', header.results), body)  # by a starter that comes again
        header.delete()  # the chord does not need it
        header.save()
        finish(app, Context(id=task_id, chord=json.loads(json.dumps(body))), value)
    assert bodies(app) == [[[0, [1, [2]], 0]]]
    assert left_behind(store, 'a', 'b', number) == {f'{GROUP}header'}
    assert GroupResult.restore('header', app=app) == header


@pytest.mark.parametrize('end', ['SUCCESS done', 'FAILURE failure', 'REVOKED revoked'])
@pytest.mark.parametrize('ignored', [True, False])
def test_a_part_that_ignores_its_result_has_it_stored_once(store, app, end, ignored):
    parts, _, chord_id = begin(app, 'a', 'b')
    parts[0].ignore_result = ignored
    state, name = end.split()
    app.backend.store_result('another task', 1, state, request=parts[0])
    store.take_requests()
    mark, value = getattr(app.backend, f'mark_as_{name}'), ValueError() if name == 'failure' else 1
    mark('a', value, request=parts[0], store_result=not ignored)
    assert store.take_requests() == [f'PUT {TASK}a', f'GET {CHORD}{chord_id}']
    assert app.backend.get_state('a') == state
    finish(app, parts[1])
    assert len(bodies(app)) == (state == 'SUCCESS')


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
def test_odd_messages_end_no_worker(store, app, odd):
    for task_id in 'id', None:
        request = Context(id=task_id, chord=odd, chain=odd)
        app.backend.on_chord_part_return(request, 'SUCCESS', 1)
    app.backend._fail_chain(odd, ValueError('boom'))
    unknown = SimpleNamespace(name='unknown', chord=None, root_id=None, errbacks=None)  # no id
    app.backend.mark_as_failure('none', NotRegistered('unknown'), request=unknown)
    assert app.backend.get_state('none') == 'FAILURE'


# A real Celery worker


def fetch(result):
    return result.get(timeout=60, interval=0.01, disable_sync_subtasks=False)


def shapes(app):  # of chords with their values, and of chords that fail
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
        'ignored': (chord([add(1), ignored(2)], total()), 3),
        'ignored, by name': (chord([add(1), app.signature('ignored', [2])], total()), 3),
        'stamped': (stamped, 3),
    }  # fmt: skip
    bodies = {
        'a group': group(total(), total(), app=app),
        'a chain in a group': group(total(), total() | add(1), app=app),
        'a chain alone in a group': group(total() | add(1), app=app),
        'a chord in a group': group(after, total(), app=app),
        'a chord': after,
        'a chain': total() | add(1),
    }
    silent = fail().set(ignore_result=True)
    errors = {name: chord([add(1), chord([fail()], bodies[name])], total()) for name in bodies}
    return values, errors | {
        'an inner chord, first': chord([chord([add(1), fail()], total()), add(1)], total()),
        'group | group': group(fail(), add(1), app=app) | bodies['a chain in a group'],
        'replaced by a group that fails': chord([replaced('fail'), add(1)], total()),
        'ignored, and its body a chain': chord([silent, add(1)], total() | add(1)),
        'ignored, in a chain': chord([silent | add(1).set(ignore_result=True)], total()),
    }


@pytest.mark.real_time
def test_chords_of_every_shape_give_their_value_or_their_error(store):
    with working(make_app()) as app:
        values, errors = shapes(app)
        for shape, (signature, value) in values.items():
            assert (shape, fetch(signature.apply_async())) == (shape, value)
        store.take_requests()
        for shape, signature in errors.items():
            # A result's own get() would raise the error of a parent.
            for task in celery_s3.find_tasks([signature.apply_async()]):
                meta = app.backend.wait_for(task.id, timeout=60, interval=0.01)
                assert (shape, meta['status']) == (shape, 'FAILURE')
                assert 'boom' in str(meta['result'])
        stored = [sent for sent in store.sent if sent.startswith(f'PUT {TASK}')]
        assert len(stored) == len({*stored})  # each once


@pytest.mark.real_time
@pytest.mark.parametrize('missing', [[ROOMS[0]], [ROOMS[1]], [ROOMS[2]], ROOMS])
def test_each_class_can_be_taken_out_and_all_three(store, monkeypatch, missing):
    rest = [room for room in ROOMS if room not in missing] or [celery_s3.S3KeyValueBackend]
    monkeypatch.setattr(celery_s3, 'Rest', type('Rest', (*rest,), {}), raising=False)
    with working(make_app(backend='Rest')) as app:
        add, fail, total = (app.tasks[name].s for name in 'add fail total'.split())
        pair = [add(1), add(2)]
        # Without the chords' class, each takes a second: they do so together.
        right, wrong = (chord(parts, total(), app=app).apply_async() for parts in (pair, [fail()]))
        assert fetch(add(1, 2).delay()) == 3
        assert fetch(group(pair, app=app).delay()) == [1, 2]
        assert fetch((add(1) | add(2) | add(3)).delay()) == 6
        assert fetch(right) == 3
        assert 'boom' in str(app.backend.wait_for(wrong.id, timeout=60, interval=0.01)['result'])


# The store's contract, live where CELERY_S3_TEST_URL names a bucket


@pytest.fixture
def live(request, monkeypatch):
    """The settings of a folder of its own in the live bucket, or in the stub."""
    if not LIVE_URL:
        request.getfixturevalue('store')
        yield {'bucket': 'results'}
        return
    url, send, keys = urlsplit(LIVE_URL), Bucket._send, set()

    def note(bucket, method, key, *args, **kwargs):
        keys.add(key)
        return send(bucket, method, key, *args, **kwargs)

    monkeypatch.setattr(Bucket, '_send', note)
    folder = f'{url.path}/celery-s3-test-{uuid.uuid4().hex}'
    settings = {'bucket': url.netloc, 'base_path': folder, **dict(parse_qsl(url.query))}
    settings['conditional_writes'] = settings.get('conditional_writes') != 'False'
    yield settings
    for key in list(keys):
        Bucket(**settings).delete(key)


@pytest.mark.real_time
def test_store_keeps_bytes_and_odd_keys(live):
    bucket = Bucket(**live)
    for value in b'', b'\x00\xff', os.urandom(3_000_000):
        bucket.put('key', value)
        assert bucket.get('key')[0] == value
    bucket.delete('key')
    bucket.delete('key')
    assert bucket.get('key') == (None, None)
    ids = [task_id for task_id in ODD_IDS if task_id not in EMPTY_SEGMENTS]
    for task_id in ids:
        bucket.put(TASK + task_id, task_id.encode())
    assert [bucket.get(TASK + task_id)[0].decode() for task_id in ids] == ids


@pytest.mark.real_time
def test_store_never_overwrites_a_success(live):
    backends = [make_app(live).backend for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda backend: backend.store_result('id', 1, 'SUCCESS'), backends))
        list(threads.map(lambda backend: backend.store_result('id', 2, 'FAILURE'), backends))
    for state in 'STARTED', 'PROGRESS', 'SUCCESS', 'FAILURE':
        backends[0].store_result('other', state, state)
    assert backends[1].get_result('id') == 1
    assert backends[1].get_state('other') == 'SUCCESS'


@pytest.mark.real_time
def test_store_runs_chords(live):
    with working(make_app(live), pool='threads', concurrency=8) as app:
        parts = [app.tasks['add'].s(number) for number in range(8)]
        results = [chord(parts, app=app)(app.tasks['total'].s()) for _ in range(3)]
        assert [fetch(result) for result in results] == [28, 28, 28]


@pytest.mark.skipif(not LIVE_URL, reason='CELERY_S3_TEST_URL is not set')
@pytest.mark.real_time
def test_store_refuses_a_wrong_secret(live):
    keys = {'aws_access_key_id': os.environ['AWS_ACCESS_KEY_ID'], 'aws_secret_access_key': 'x'}
    try:
        Bucket(**{**live, **keys}).get('key')
        pytest.skip('it checks no signatures')
    except ClientError as error:
        assert error.response['Error']['Code'] == 'SignatureDoesNotMatch'


@pytest.mark.real_time
def test_store_tells_an_absent_bucket_from_an_absent_key(live):
    absent = f'celery-s3-absent-{uuid.uuid4().hex}'
    bucket = Bucket(**{**live, 'bucket': absent})
    for use in bucket.get, bucket.delete, lambda key: bucket.put_if(key, b'', None):
        with pytest.raises(ClientError, match=f'NoSuchBucket.*s3://{absent}/'):
            use('key')
