"""The rules of celery_s3, each on the wire: what is sent, and what comes back.

`CELERY_S3_TEST_URL='s3://bucket/prefix?endpoint_url=...' pytest -k test_store` runs the store's
contract, the last section, against that live bucket; without it, it runs on `responses`.
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import botocore.auth
import botocore.httpsession
import pytest
import requests
import responses
from botocore import exceptions
from botocore.awsrequest import AWSResponse
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import ClientError, ConnectionClosedError
from celery import Celery, chord, group
from celery.app.task import Context
from celery.contrib.testing.worker import start_worker
from celery.exceptions import BackendStoreError, ChordError, Ignore, ImproperlyConfigured
from celery.exceptions import NotRegistered
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, GroupResult
from celery.utils.objects import Bunch
from kombu.transport import memory

import celery_s3.backends
from celery_s3 import Bucket, S3Backend

ENVIRONMENT = dict(os.environ)
LIVE_URL = os.environ.get('CELERY_S3_TEST_URL')
SECRET = 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY'
TASK, CHORD = 'celery-task-meta-', 'chord-unlock-'


# S3 on `responses`


def to_str(value):
    return value.decode() if isinstance(value, bytes) else value


def signed_for(request):
    """The region in the signature's scope."""
    return to_str(request.headers['Authorization']).split('/')[2]


def refusal(status, code, headers=None, message='No.'):
    body = f'<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return status, {'x-amz-request-id': 'R1', **(headers or {})}, body


def refused(status, code, headers=None):
    return lambda answer: refusal(status, code, headers)


def dropped(answer):
    raise ConnectionClosedError(endpoint_url='dropped')


def lost(answer):
    answer()
    raise ConnectionClosedError(endpoint_url='lost')


class Sent(str):
    """A request, as 'METHOD key'; its headers are an attribute."""


class Store:
    """The bucket `results` in memory, which answers as S3 does."""

    def __init__(self):
        self.objects, self.faults, self.sent = {}, [], []
        self.region, self.etag_forms, self.hide_missing = 'us-east-1', ('quoted', 'bare'), False
        self.gate, self.lock = None, threading.RLock()

    def fail_next(self, pattern, fault, times=1):
        """The next requests whose 'METHOD key' begins like the pattern meet a fault.

        A fault is called with a function that answers as S3 does. It may call that, late or not
        at all, and returns an answer or raises."""
        self.faults += [(pattern, fault)] * times

    def take_requests(self):
        taken = list(self.sent)
        self.sent.clear()
        return taken

    def count_requests(self):
        return Counter(request.split()[0] for request in self.take_requests())

    def __call__(self, request):
        url = urlsplit(request.url)
        bucket, _, host = url.hostname.partition('.')
        key = unquote(url.path[1:])
        if not host.startswith('s3'):  # path style
            bucket, _, key = key.partition('/')
        sent = Sent(f'{request.method} {key}')
        sent.headers = {name: to_str(value) for name, value in request.headers.items()}
        if self.gate:
            self.gate(sent)
        with self.lock:
            self.sent.append(sent)
            fault = next((fault for fault in self.faults if re.match(fault[0], sent)), None)
            if fault:
                self.faults.remove(fault)

        def answer():
            with self.lock:
                return self.answer(request, bucket, key)

        return fault[1](answer) if fault else answer()

    def answer(self, request, bucket, key):
        if signed_for(request) != self.region:
            bucket_region = {'x-amz-bucket-region': self.region}
            return refusal(400, 'AuthorizationHeaderMalformed', bucket_region)
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
        return refusal(403, 'AccessDenied') if self.hide_missing else refusal(404, 'NoSuchKey')

    def put(self, key, body, headers):
        match = to_str(headers.get('If-Match'))
        if match:
            form = 'quoted' if match[0] == '"' else 'bare'
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


def clear_environment(monkeypatch):
    for name in os.environ:
        if name.startswith('AWS_') or name.lower().endswith('_proxy') or 'CA_BUNDLE' in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'AKIAIOSFODNN7EXAMPLE')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', SECRET)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    clear_environment(monkeypatch)
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path / 'config'))
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'credentials'))


@pytest.fixture(autouse=True)
def no_chance(monkeypatch):
    """A random pause is the longest possible, and a random order the one that was given."""
    monkeypatch.setattr(random, 'uniform', lambda low, high: high)
    monkeypatch.setattr(random, 'sample', lambda population, size: list(population))


@pytest.fixture(autouse=True)
def clock(request, monkeypatch):
    """Time stands still in each test that is not marked with `real_time`."""
    clock = Clock()
    if not request.node.get_closest_marker('real_time'):
        monkeypatch.setattr(celery_s3, 'time', clock)
    return clock


@pytest.fixture
def connections(monkeypatch):
    """How each `URLLib3Session` of a bucket was made."""
    made, make = [], botocore.httpsession.URLLib3Session.__init__

    def init(session, *args, **kwargs):
        if 'socket_options' in kwargs:  # botocore makes others to look up credentials
            made.append(kwargs)
        make(session, *args, **kwargs)

    monkeypatch.setattr(botocore.httpsession.URLLib3Session, '__init__', init)
    return made


@pytest.fixture
def wire(monkeypatch):
    """`responses` sees what `URLLib3Session` sends."""
    sessions = []

    def send(session, request):
        sessions.append(session)
        headers = {to_str(name): to_str(value) for name, value in request.headers.items()}
        outgoing = requests.Request(request.method, request.url, headers, data=request.body)
        with requests.Session() as http:
            answer = http.send(outgoing.prepare(), allow_redirects=False, stream=True)
        answer.raw.enforce_content_length = False  # nor does URLLib3Session
        response = AWSResponse(request.url, answer.status_code, answer.headers, None)
        response._content = answer.raw.read()
        return response

    monkeypatch.setattr(botocore.httpsession.URLLib3Session, 'send', send)
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.sessions = sessions
        yield mock


@pytest.fixture
def store(wire):
    store = Store()
    for method in 'GET', 'PUT', 'DELETE':
        wire.add_callback(method, re.compile('https?://'), callback=store)
    return store


make_bucket = functools.partial(Bucket, bucket='results')


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
    one, other = (task.app.tasks[task_name] for task_name in ('add', name))
    raise task.replace(group(one.s(1), other.s(2), app=task.app))


def make_app(settings=None, **conf):
    app = Celery('tests', broker='memory://', set_as_current=False)
    app.conf.update(
        result_backend='celery_s3.S3Backend',
        CELERY_S3_BACKEND_SETTINGS={'bucket': 'results'} if settings is None else settings,
        broker_connection_retry_on_startup=True,
        broker_transport_options={'polling_interval': 0.005},
        worker_hijack_root_logger=False,
        **conf,
    )

    for function in add, fail, total:
        app.task(name=function.__name__, shared=False)(function)
    app.task(name='ignored', shared=False, ignore_result=True)(add)
    for function in replaced, retried:
        app.task(name=function.__name__, shared=False, bind=True)(function)
    return app


@pytest.fixture
def app():
    memory.Channel.queues.clear()
    return make_app()


@pytest.fixture
def backend(app):
    return app.backend


# Errors


def client_error(status, code):
    answer = {'Error': {'Code': code}, 'ResponseMetadata': {'HTTPStatusCode': status}}
    return ClientError(answer, 'GET')


def test_exactly_transient_faults_are_safe_to_retry():
    transient = [client_error(status, 'Any') for status in (429, 500, 502, 503, 504)]
    transient += [client_error(400, code) for code in ('RequestTimeout', 'Throttling')]
    transient += [client_error(409, 'ConcurrentModification')]  # Ceph 20, of a lost race
    names = 'ConnectionClosed ConnectTimeout EndpointConnection ProxyConnection ReadTimeout SSL'
    for name in names.split():
        error = getattr(exceptions, f'{name}Error')
        transient += [error(endpoint_url='e', error='x', proxy_url='p')]
    final = [client_error(status, 'Any') for status in (400, 403, 404, 412, 501)]
    final += [exceptions.NoCredentialsError(), ValueError('key'), client_error(400, None)]
    final += [exceptions.HTTPClientError(error='any')]
    final += [exceptions.SSLError(endpoint_url='e', error='CERTIFICATE_VERIFY_FAILED')]
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
    carried = [sent.headers.get('x-amz-tagging') for sent in store.sent]
    assert carried == ['a=b', 'a=b', 'a=b', None, None]


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
    assert bucket.put_if('gone', b'x', 'abc') == (None, None)


@pytest.mark.parametrize('etag', [None, 'abc'])
def test_a_wrong_header_surfaces_as_s3s_own_error(store, etag):
    store.fail_next('PUT', refused(400, 'InvalidArgument'), times=9)
    with pytest.raises(ClientError, match='InvalidArgument'):
        make_bucket(headers={'x-amz-acl': 'wrong'}).put_if('key', b'', etag)
    assert len(store.sent) == 1


# The environment


def sent_to(wire, bucket):
    """The URL of the key 'k', and the region of its signature."""
    wire.add_callback('GET', re.compile('https?://'), lambda request: (200, {}, ''))
    bucket.get('k')
    request = wire.calls[-1].request
    return request.url, signed_for(request)


def test_the_region_comes_from_the_environment_and_a_setting_overrides(wire, monkeypatch):
    assert sent_to(wire, make_bucket())[1] == 'us-east-1'
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'eu-central-1')
    url = 'https://results.s3.eu-central-1.amazonaws.com/k'
    assert sent_to(wire, make_bucket()) == (url, 'eu-central-1')
    told = []  # STS is asked in the region that the session knows
    tell = 'botocore.session.Session.set_config_variable'
    monkeypatch.setattr(tell, lambda session, *variable: told.append(variable))
    assert sent_to(wire, make_bucket(aws_region='us-gov-west-1'))[1] == 'us-gov-west-1'
    assert told == [('region', 'us-gov-west-1')]


def test_a_profile_says_region_credentials_and_ca_bundle(wire, connections, tmp_path):
    (tmp_path / 'config').write_text(
        '[profile worker]\nregion = sa-east-1\nca_bundle = /profile.pem\n'
        'aws_access_key_id = PROFILEKEY\naws_secret_access_key = x\n'
    )
    assert sent_to(wire, make_bucket(aws_profile='worker'))[1] == 'sa-east-1'
    assert 'PROFILEKEY' in to_str(wire.calls[-1].request.headers['Authorization'])
    assert connections[-1]['verify'] == '/profile.pem'


def test_the_endpoint_comes_from_the_environment_and_a_setting_overrides(wire, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://any:1')
    assert sent_to(wire, make_bucket())[0] == 'http://any:1/results/k'
    monkeypatch.setenv('AWS_ENDPOINT_URL_S3', 'http://s3:2')
    assert sent_to(wire, make_bucket())[0] == 'http://s3:2/results/k'
    bucket = make_bucket(endpoint_url='https://mine:3/')
    assert sent_to(wire, bucket)[0] == 'https://mine:3/results/k'
    monkeypatch.setenv('AWS_IGNORE_CONFIGURED_ENDPOINT_URLS', 'true')
    assert sent_to(wire, make_bucket())[0] == 'https://results.s3.us-east-1.amazonaws.com/k'


def test_proxies_and_ca_bundles_come_from_the_environment(connections, monkeypatch):
    make_bucket()
    monkeypatch.setenv('HTTPS_PROXY', 'http://proxy:3128')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/requests.pem')
    make_bucket()
    monkeypatch.setenv('AWS_CA_BUNDLE', '/aws.pem')
    monkeypatch.setenv('NO_PROXY', '.amazonaws.com')
    make_bucket(max_connections=1)
    assert [made['verify'] for made in connections] == [True, '/requests.pem', '/aws.pem']
    assert [made['max_pool_connections'] for made in connections] == [50, 50, 1]
    assert connections[0]['socket_options'] == [(6, 1, 1)]  # TCP_NODELAY
    assert connections[0].get('timeout', botocore.httpsession.DEFAULT_TIMEOUT) == 60
    proxies = [made['proxies'].get('https') for made in connections]
    assert proxies == [None, 'http://proxy:3128', None]


@pytest.mark.parametrize(
    ('bucket', 'region', 'root'),
    [
        ('results', 'eu-west-1', 'https://results.s3.eu-west-1.amazonaws.com/'),
        ('results', 'cn-north-1', 'https://results.s3.cn-north-1.amazonaws.com.cn/'),
        ('results', 'us-iso-east-1', 'https://results.s3.us-iso-east-1.c2s.ic.gov/'),
        ('results', 'moon-1', 'https://results.s3.moon-1.amazonaws.com/'),
        ('my.results', 'eu-west-1', 'https://s3.eu-west-1.amazonaws.com/my.results/'),
        ('My_Results', 'us-east-1', 'https://s3.us-east-1.amazonaws.com/My_Results/'),
    ],
)
def test_the_url_fits_the_partition_and_the_bucket(wire, bucket, region, root):
    assert sent_to(wire, make_bucket(bucket=bucket, aws_region=region)) == (f'{root}k', region)


def test_fips_and_dual_stack_hosts_are_honoured(wire, monkeypatch):
    def host(fips, dual_stack):
        monkeypatch.setenv('AWS_USE_FIPS_ENDPOINT', fips)
        monkeypatch.setenv('AWS_USE_DUALSTACK_ENDPOINT', dual_stack)
        return urlsplit(sent_to(wire, make_bucket())[0]).hostname

    assert host('true', 'true') == 'results.s3-fips.dualstack.us-east-1.amazonaws.com'


@pytest.mark.parametrize('base_path', ['/box/', 'box/', 'box', '//box//'])
def test_base_path_names_a_folder(store, base_path):
    bucket = make_bucket(base_path=base_path)
    bucket.put('key', b'x')
    assert bucket.uri == 's3://results/box/'
    assert list(store.objects) == ['box/key']


EMPTY_SEGMENTS = ['a//b', '/lead', 'trail/']  # SeaweedFS and MinIO do not keep these
ODD_IDS = EMPTY_SEGMENTS + [
    'a b', 'a+b', '100%', 'a%2Fb', 'a?acl', 'a#b', 'a&b=c', '"quoted"', "it's", '<tag>', 'é', '☃',
    '𝄞', 'back\\slash', '~', 'a;b,c:d@e!f$g*h(i)', '...', 'a..b', '.x',
]  # fmt: skip


@pytest.mark.parametrize('task_id', ODD_IDS)
def test_any_id_lands_at_exactly_its_key(store, backend, task_id):
    backend.store_result(task_id, task_id, 'SUCCESS')
    assert list(store.objects) == [TASK + task_id]
    assert backend.get_result(task_id) == task_id


@pytest.mark.parametrize(
    'key', ['a/../b', '..', '../x', './x', 'x/.', 'a\nb', '\0', '\x1f', '\x7f']
)
def test_an_unsafe_key_is_refused_before_anything_is_sent(store, key):
    bucket = make_bucket()
    for use in bucket.get, bucket.delete, lambda key: bucket.put(key, b''):
        with pytest.raises(ValueError, match='not safe in a key'):
            use(key)
    assert store.sent == []


# Signing, and failures


def test_a_signature_to_the_letter(store, monkeypatch):
    now = datetime(2013, 5, 24)
    monkeypatch.setattr(botocore.auth, 'get_current_datetime', lambda: now, raising=False)
    before_1_40 = SimpleNamespace(datetime=SimpleNamespace(utcnow=lambda: now))
    monkeypatch.setattr(botocore.auth, 'datetime', before_1_40)
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


def test_each_attempt_is_signed_afresh_with_the_credentials_of_the_moment(store, monkeypatch):
    keys = iter([('OLD', SECRET, 'token'), ('NEW', SECRET, None)])
    monkeypatch.setattr(
        Credentials, 'get_frozen_credentials', lambda _: ReadOnlyCredentials(*next(keys))
    )
    store.fail_next('GET', refused(503, 'SlowDown'))
    make_bucket().get('x')
    first, second = (call.headers for call in store.sent)
    assert ('OLD' in first['Authorization'], first['X-Amz-Security-Token']) == (True, 'token')
    assert 'NEW' in second['Authorization'] and 'X-Amz-Security-Token' not in second


def test_without_credentials_the_error_says_so_until_they_come(store, monkeypatch):
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    bucket = make_bucket()
    with pytest.raises(exceptions.NoCredentialsError):
        bucket.get('x')
    assert store.sent == []
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'LATER')
    assert bucket.get('x') == (None, None)


def test_credentials_are_looked_up_by_one_thread_at_a_time(store, backend, monkeypatch):
    look_up, together = botocore.session.Session.get_credentials, threading.Barrier(2)
    met = []

    def meet(session):
        try:
            met.append(together.wait(0.02))  # nobody else may get here meanwhile
        except threading.BrokenBarrierError:
            together.reset()
        return look_up(session)

    monkeypatch.setattr(botocore.session.Session, 'get_credentials', meet)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(backend.get, 'abcdefgh'))
    assert met == []


FAULTS = [refused(503, 'SlowDown'), refused(400, 'Throttling'), dropped]
FAULTS += [lambda answer: (503, {}, '<html>busy</html>'), lambda answer: (500, {}, '')]


@pytest.mark.parametrize('fault', FAULTS)
def test_what_may_pass_is_tried_again(store, clock, fault):
    bucket = make_bucket()
    for method, use in ('GET', bucket.get), ('DELETE', bucket.delete):
        store.fail_next(method, fault, times=4)
        use('key')
        assert store.take_requests() == [f'{method} key'] * 5
    store.fail_next('PUT', fault, times=4)
    bucket.put('key', b'x')
    assert clock.slept == [0.2, 0.4, 0.8, 1.6] * 3  # full jitter's longest


def test_each_retry_is_a_warning_that_says_what_and_why(store, caplog):
    store.fail_next('PUT', refused(503, 'SlowDown'))
    store.fail_next('PUT', dropped)
    make_bucket(base_path='box').put('key', b'x')
    logged = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert [line.split(':')[0] for line in logged] == ['PUT s3', 'PUT s3']
    assert re.search(r's3://results/box/key: .*SlowDown.*; attempt 2 in 0.2 s$', logged[0])
    assert re.search(r's3://results/box/key: .*dropped.*; attempt 3 in 0.4 s$', logged[1])


@pytest.mark.parametrize(('given', 'attempts'), [('0', 5), ('1', 1), ('12', 12), ('-1', 1)])
def test_aws_max_attempts_says_how_often_to_try(store, clock, monkeypatch, given, attempts):
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', given)
    monkeypatch.setattr(random, 'uniform', lambda low, high: low + (high - low) / 4)
    store.fail_next('GET', dropped, times=99)
    with pytest.raises(ConnectionClosedError):
        make_bucket().get('key')
    assert len(store.sent) == attempts
    jittered = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5]  # of at most 20 seconds
    assert clock.slept == pytest.approx(jittered[: attempts - 1])


def test_what_strikes_inside_a_request_is_not_wrapped_and_ends_it(wire, monkeypatch):
    def send(http, request):
        raise exceptions.HTTPClientError(error=Ignore('now'))  # as URLLib3Session does

    monkeypatch.setattr(botocore.httpsession.URLLib3Session, 'send', send)
    with pytest.raises(Ignore, match='now'):
        make_bucket().put('key', b'x')


@pytest.mark.parametrize('body', ['', 'half'])
def test_a_body_cut_short_is_a_dropped_connection(wire, clock, body):
    url = 'https://results.s3.us-east-1.amazonaws.com/key'
    wire.get(url, body=body, headers={'Content-Length': '8'}, auto_calculate_content_length=False)
    wire.get(url, body='complete', headers={'Content-Length': '8'})
    assert make_bucket().get('key')[0] == b'complete'
    assert len(wire.calls) == 2


@pytest.mark.parametrize('opening', ['<Error>', '<Error xmlns="x">'])
def test_an_error_after_200_is_a_failure_of_a_put_only(store, opening):
    bucket = make_bucket()
    body = f'<?xml version="1.0"?>{opening}<Code>InternalError</Code></Error>'
    store.fail_next('PUT', lambda answer: (200, {}, body))
    bucket.put('key', body.encode())
    assert store.sent == ['PUT key'] * 2
    assert bucket.get('key')[0] == body.encode()


@pytest.mark.parametrize('page', ['<html>not found</html>', ''])
@pytest.mark.parametrize('status', [300, 404])
def test_an_answer_that_is_not_s3s_is_an_error(store, page, status):
    store.fail_next('GET', lambda answer: (status, {}, page))
    with pytest.raises(ClientError, match=f'HTTP {status}'):
        make_bucket().get('key')


def test_an_error_tells_what_s3_said(store):
    store.fail_next('PUT', lambda answer: refusal(400, 'InvalidTag', message='The tag is bad'))
    with pytest.raises(ClientError) as error:
        make_bucket().put('key', b'x')
    operation = 'PUT s3://results/key (HTTP 400, region us-east-1, request R1)'
    said = f'(InvalidTag) when calling the {operation} operation: The tag is bad'
    assert str(error.value) == f'An error occurred {said}'


@pytest.mark.parametrize('status', [301, 307, 400])
def test_a_bucket_in_another_region_is_an_error_that_names_it(store, status):
    store.fail_next('GET', refused(status, 'Any', {'x-amz-bucket-region': 'eu-west-1'}))
    with pytest.raises(ClientError, match=f'HTTP {status}, region eu-west-1'):
        make_bucket().get('key')
    assert store.sent == ['GET key']
    store.region = 'eu-west-1'
    assert make_bucket(aws_region='eu-west-1').get('key') == (None, None)


def test_a_denied_read_is_an_error_unless_denied_is_missing(store):
    store.hide_missing = True
    with pytest.raises(ClientError, match='AccessDenied'):
        make_bucket().get('key')
    bucket = make_bucket(denied_is_missing=True)
    assert bucket.get('key') == (None, None)
    store.fail_next('GET', refused(403, 'InvalidAccessKeyId'))
    with pytest.raises(ClientError, match='InvalidAccessKeyId'):
        bucket.get('key')
    store.fail_next('PUT', refused(403, 'AccessDenied'))
    with pytest.raises(ClientError, match='AccessDenied'):
        bucket.put('key', b'x')


# S3Backend


class OldStyle:
    CELERY_RESULT_BACKEND = 'celery_s3.backends.S3Backend'  # as in celery-s3 1.x
    CELERY_S3_BACKEND_SETTINGS = {'bucket': 'results', 'base_path': 'celery'}


LOWER_CASE = {
    'result_backend': 'celery_s3.S3Backend',
    's3_backend_settings': {'bucket': 'results', 'base_path': 'celery'},
}


@pytest.mark.parametrize(
    ('settings', 'namespace'), [(OldStyle, None), (OldStyle, 'CELERY'), (LOWER_CASE, None)]
)
def test_settings_are_found_whatever_their_style(settings, namespace):
    app = Celery(set_as_current=False)
    app.config_from_object(settings, namespace=namespace)
    assert type(app.backend) is S3Backend
    assert app.backend.as_uri() == app.backend.as_uri(True) == 's3://results/celery/'
    assert celery_s3.backends is celery_s3


@pytest.mark.parametrize('unset', [None, ''])
def test_none_and_nothing_mean_not_set(unset):
    settings = dict.fromkeys(Bucket.__annotations__, unset) | {'bucket': 'results'}
    bucket = make_app(settings).backend.bucket
    assert (bucket.max_connections, bucket.headers) == (50, {})
    assert (bucket.conditional_writes, bucket.denied_is_missing) == (True, False)


@pytest.mark.parametrize(
    ('settings', 'problem'),
    [
        ({}, 'bucket'),
        ({'bucket': ''}, 'bucket'),
        (['bucket'], 'a dict of bucket, '),
        ({'bucket': 'b', 'buckt': 'x'}, "'buckt'"),
        ({'bucket': 'b', 'buckt': None}, "'buckt'"),
        ({'bucket': 1}, 'bucket must be of type str'),
        ({'bucket': 'b', 'headers': 'x-amz-tagging'}, 'headers must be of type dict'),
        ({'bucket': 'b', 'conditional_writes': 'False'}, 'conditional_writes must be of type b'),
        ({'bucket': 'b', 'denied_is_missing': 1}, 'denied_is_missing must be of type bool'),
        ({'bucket': 'b', 'max_connections': '7'}, 'max_connections must be of type int'),
        ({'bucket': 'b', 'max_connections': True}, 'max_connections must be of type int'),
        ({'bucket': 'b', 'max_connections': 0}, 'max_connections must be 1 or more'),
        ({'bucket': 'b', 'headers': {'x-amz-acl': True}}, 'headers must be .* printable ASCII'),
        ({'bucket': 'b', 'headers': {'x-amz-meta-é': ''}}, 'headers must be .* printable ASCII'),
        ({'bucket': 'b', 'headers': {'x-amz-acl': 'a\nb'}}, 'headers must be .* printable ASCII'),
        ({'bucket': 'b', 'base_path': './x'}, 'base_path must not hold'),
        ({'bucket': 'b', 'base_path': 'a/../x/'}, 'base_path must not hold'),
        ({'bucket': 'b', 'aws_access_key_id': 'A'}, 'aws_secret_access_key go together'),
        ({'bucket': 'b', 'aws_secret_access_key': 'S'}, 'aws_access_key_id and'),
        ({'bucket': 'b', 'aws_session_token': 'T'}, 'aws_access_key_id and'),
        ({'bucket': 'b', 'aws_profile': 'absent'}, r'profile \(absent\) could not be found'),
        ({'bucket': 'b', 'endpoint_url': 'localhost:9000'}, 'endpoint_url must begin with http'),
        ({'bucket': 'b', 'endpoint_url': 'http://a:b@host'}, 'endpoint_url must begin with http'),
        ({'bucket': 'b', 'reduced_redundancy': True}, "'reduced_redundancy'"),
    ],
)
def test_a_wrong_setting_is_named_before_any_request(wire, settings, problem):
    with pytest.raises(ImproperlyConfigured, match=f'CELERY_S3_BACKEND.*{problem}') as error:
        assert make_app(settings).backend
    assert 'base_path, aws_region' in str(error.value)  # the remedy: what they are called
    assert not wire.calls


def test_no_secret_shows(store):
    keys = {'aws_access_key_id': 'AKID', 'aws_secret_access_key': SECRET}
    app = make_app({'bucket': 'results', **keys, 'aws_session_token': 'TOKEN'})
    store.fail_next('GET', refused(400, 'ExpiredToken'))
    with pytest.raises(ClientError) as error:
        app.backend.get('key')
    assert store.sent[0].headers['X-Amz-Security-Token'] == 'TOKEN'
    assert 'Credential=AKID/' in store.sent[0].headers['Authorization']
    with pytest.raises(ImproperlyConfigured) as typo:
        assert make_app({'bucket': 'results', 'aws_secret_acces_key': SECRET}).backend
    shown = [app.backend, app.backend.bucket, app.backend.as_uri(True), error.value, typo.value]
    shown += [error.value.response, pickle.dumps(app.backend)]
    assert not re.search(f'{SECRET}|TOKEN', ' '.join(map(repr, shown)))


def test_making_a_backend_sends_nothing_and_imports_no_boto3(wire, backend):
    assert not wire.calls
    assert backend.thread_safe  # else Celery makes one for each thread
    program = 'import celery_s3, sys; sys.exit("boto3" in sys.modules)'
    folder = os.path.dirname(celery_s3.__file__)
    assert subprocess.run([sys.executable, '-c', program], cwd=folder).returncode == 0


@pytest.mark.parametrize('value', ['text', 'é', b'\x80bytes', b'', b'x' * 5_000_000])
def test_values_come_back_as_bytes(store, backend, value):
    backend.set(b'key', value)
    assert backend.get(b'key') == (value.encode() if isinstance(value, str) else value)
    backend.set('key', b'other')
    assert backend.bucket.get('key') == (b'other', store.etag('key'))
    backend.delete(b'key')
    assert backend.bucket.get('key') == (None, None)
    store.fail_next('DELETE', refused(404, 'NoSuchKey'))  # as some stores answer
    backend.delete('key')
    methods = [request.split()[0] for request in store.take_requests()]
    assert methods == ['PUT', 'GET', 'PUT', 'GET', 'DELETE', 'GET', 'DELETE']


@pytest.mark.skipif(not hasattr(S3Backend, 'prepare_compression'), reason='Celery 5.7')
def test_compressed_results(store):
    backend = make_app(result_compression='gzip').backend
    backend.store_result('id', 'x' * 10_000, 'SUCCESS')
    assert len(store.objects[f'{TASK}id']) < 1000
    assert backend.get_result('id') == 'x' * 10_000


def test_poll_fetch_and_forget_cost_one_request_each(store, app):
    result = AsyncResult('id', app=app)
    assert result.state == 'PENDING'
    store.finish('id', 42)
    assert result.get() == 42
    result.forget()
    assert store.take_requests() == [f'GET {TASK}id', f'GET {TASK}id', f'DELETE {TASK}id']
    assert store.objects == {}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_fork_shares_neither_connections_nor_locks(store, wire, backend, monkeypatch):
    look_up = botocore.session.Session.get_credentials
    begun, forked = threading.Event(), threading.Event()

    def hold(session):  # under the lock
        begun.set()
        forked.wait(10)
        return look_up(session)

    backend.get_state('id')
    parent = wire.sessions[-1]
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
        patch.setattr(botocore.session.Session, 'get_credentials', hold)
        held = threads.submit(backend.get_state, 'id')
        begun.wait(10)
        child = os.fork()
        forked.set()
        if not child:
            worker = threading.Thread(target=backend.get_state, args=['id'], daemon=True)
            worker.start()
            worker.join(10)
            os._exit(wire.sessions[-1] is parent or worker.is_alive())
        assert (os.waitpid(child, 0)[1], held.result()) == (0, 'PENDING')
    backend.get_state('id')
    assert wire.sessions[-1] is parent


# Storing


def test_each_state_is_one_put_on_the_last_and_the_first_must_find_nothing(store, backend):
    etags = []
    for state in 'STARTED', 'PROGRESS', 'PROGRESS', 'RETRY', 'STARTED', 'SUCCESS':
        backend.store_result('id', {'n': len(etags)}, state)
        etags.append(f'"{store.etag(f"{TASK}id")}"')
    sent = store.take_requests()
    assert sent == [f'PUT {TASK}id'] * 6
    conditions = [request.headers.get('If-Match') for request in sent]
    assert conditions == [None, *etags[:-1]]
    assert sent[0].headers['If-None-Match'] == '*'
    assert json.loads(store.objects[f'{TASK}id'])['result'] == {'n': 5}


LATE = {'exc_type': 'ValueError', 'exc_message': 'late', 'exc_module': 'builtins'}


@pytest.mark.parametrize('state', ['STARTED', 'RETRY', 'FAILURE', 'REVOKED', 'SUCCESS'])
@pytest.mark.parametrize('writer', ['the same', 'another', 'one that stored STARTED before'])
def test_nothing_replaces_a_success(store, app, state, writer):
    backend = app.backend if writer == 'the same' else make_app().backend
    if writer == 'one that stored STARTED before':
        backend.store_result('id', None, 'STARTED')
    app.backend.store_result('id', 'right', 'SUCCESS')
    for _ in range(2):
        store.take_requests()
        backend.store_result('id', LATE, state)
        methods = [name.split()[0] for name in store.take_requests()]
        assert methods in (['PUT', 'GET'], ['PUT', 'PUT', 'GET'])
    assert backend.get_result('id') == 'right'


@pytest.mark.parametrize('state', ['STARTED', 'RETRY', 'FAILURE', 'REVOKED'])
def test_any_other_state_is_replaced(store, app, state):
    app.backend.store_result('id', LATE, state)
    other = make_app().backend
    store.take_requests()
    other.store_result('id', 'right', 'SUCCESS')
    assert store.take_requests() == [f'PUT {TASK}id', f'GET {TASK}id', f'PUT {TASK}id']
    assert app.backend.get_result('id') == 'right'


@pytest.mark.parametrize('sequence', ['SUCCESS', 'STARTED SUCCESS', 'STARTED PROGRESS FAILURE'])
def test_an_answer_lost_after_the_write_ends_in_the_right_state(store, backend, sequence):
    for state in sequence.split():
        store.fail_next('PUT', lost)
        backend.store_result('id', LATE, state)
        assert backend.get_state('id') == state
    backend.store_result('id', 'next', 'PROGRESS')
    assert backend.get_state('id') == ('SUCCESS' if state == 'SUCCESS' else 'PROGRESS')


@pytest.mark.parametrize(('conflicts', 'ends'), [(37, 'SUCCESS'), (39, 'PROGRESS')])
def test_others_who_never_stop_writing_are_an_error(store, backend, conflicts, ends):
    store.finish('id', status='PROGRESS')
    store.fail_next('PUT', refused(412, 'PreconditionFailed'), times=conflicts)
    if ends == 'SUCCESS':
        backend.store_result('id', 1, 'SUCCESS')
    else:
        with pytest.raises(BackendStoreError, match='others write it') as error:
            backend.store_result('id', 1, 'SUCCESS')
        assert (error.value.state, error.value.task_id) == ('SUCCESS', 'id')
    store.faults.clear()
    assert backend.get_state('id') == ends


def test_a_state_keeps_its_traceback_and_its_request(store):
    backend = make_app(result_extended=True).backend
    request = Context(id='id', task='add', args=[1], kwargs={}, group='g', parent_id='p')
    backend.store_result('id', ValueError('boom'), 'FAILURE', 'line 1', request=request)
    meta = backend.get_task_meta('id')
    kept = [meta.get(name) for name in ('traceback', 'name', 'args', 'group_id', 'parent_id')]
    assert kept == ['line 1', 'add', [1], 'g', 'p']


def test_without_conditional_writes_celery_reads_before_it_writes(store):
    backend = make_app({'bucket': 'results', 'conditional_writes': False}).backend
    backend.store_result('id', None, 'STARTED')
    backend.store_result('id', 'right', 'SUCCESS')
    backend.store_result('id', ValueError('late'), 'FAILURE')
    reads_and_writes = [f'GET {TASK}id', f'PUT {TASK}id'] * 2 + [f'GET {TASK}id']
    assert store.take_requests() == reads_and_writes
    assert not [call for call in store.sent if {'If-Match', 'If-None-Match'} & set(call.headers)]
    assert backend.get_result('id') == 'right'


# Waiting, on a clock that jumps


def results_of(app, *task_ids):
    return GroupResult('g', [AsyncResult(task_id, app=app) for task_id in task_ids], app=app)


@pytest.mark.parametrize(('end', 'most', 'late'), [(4, 9, 0.5), (600, 80, 30), (3600, 200, 30)])
def test_the_longer_a_task_takes_the_less_is_asked(store, app, clock, end, most, late):
    clock.at(end, store.finish, 'id', 42)
    assert AsyncResult('id', app=app).get() == 42
    assert end <= clock.now <= end + late
    assert len(store.sent) <= most
    clock.at(clock.now + 100, store.finish, 'other')
    AsyncResult('other', app=app).get(interval=5)
    assert clock.slept[-20:] == [5] * 20  # a caller's own interval is kept


def test_a_running_group_costs_two_requests_a_second_and_is_joined_in_order(store, app, clock):
    numbers = range(1000)
    for number in numbers:
        clock.at(600, store.finish, str(number), number)
    assert results_of(app, *map(str, numbers)).get() == list(numbers)
    assert clock.now <= 630
    assert len(store.sent) <= 1000 + 2 * 600


def test_stuck_tasks_hide_none_of_those_that_end_one_after_another(store, app, clock):
    numbers = [str(number) for number in range(1000)]
    for number in numbers:
        clock.at(0.6 * (int(number) + 1), store.finish, number)
    found = results_of(app, *numbers, *(f'stuck{number}' for number in range(20))).iter_native()
    assert {next(found)[0] for _ in numbers} == set(numbers)
    assert clock.now <= 660
    assert len(store.sent) <= 8000


def test_the_only_one_that_has_ended_is_found_within_a_minute(store, app, clock):
    store.finish('failed', status='FAILURE')
    found = results_of(app, 'failed', *(f'pending{number}' for number in range(99)))
    assert next(found.iter_native())[0] == 'failed'
    assert clock.now <= 61


def test_a_join_asks_for_up_to_max_connections_at_a_time(store):
    app = make_app({'bucket': 'results', 'max_connections': 8})
    together = [threading.Barrier(size) for size in (1, 3, 8)]
    waves = iter([barrier for barrier in together for _ in range(barrier.parties)])
    store.gate = lambda sent: next(waves).wait(10)  # breaks unless a wave is on its way at once
    numbers = range(12)
    for number in numbers:
        store.finish(str(number), number)
    assert results_of(app, *map(str, numbers)).get() == list(numbers)


@pytest.mark.parametrize('limit', [0, 5, 99])
def test_a_join_has_one_pool_or_none_if_it_cannot_start(store, app, monkeypatch, limit):
    start, started = threading.Thread.start, []

    def start_some(thread):
        if len(started) == limit:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, 'start', start_some)
    numbers = range(300)
    for number in numbers:
        store.finish(str(number), number)
    assert results_of(app, *map(str, numbers)).get() == list(numbers)
    assert limit < 50 or 50 <= len(started) <= 55  # with those that look after the pool


def test_an_interrupted_join_waits_for_no_request(store, app):
    answered = threading.Event()
    for number in range(9):
        store.finish(str(number), number)
    store.gate = lambda sent: sent == f'GET {TASK}0' or answered.wait(20)
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        results_of(app, *map(str, range(9))).get()
    assert not answered.is_set()
    answered.set()
    timer.join()


@pytest.mark.parametrize('timeout', [0, 0.3, 7, 100])
@pytest.mark.parametrize('ready', [0, 9])
def test_a_timeout_ends_on_time_when_all_that_is_ready_has_been_handed_over(
    store, app, clock, timeout, ready
):
    for number in range(ready):
        store.finish(str(number))
    found = results_of(app, 'id', *map(str, range(ready))).iter_native(timeout=timeout)
    assert len({next(found)[0] for _ in range(ready)}) == ready
    with pytest.raises(CeleryTimeout, match=f'timed out .{timeout}'):
        next(found)
    assert clock.now == timeout
    store.finish('id')
    assert results_of(app, 'id', *map(str, range(ready))).get(timeout=0) == [None] * (ready + 1)


def test_a_timeout_is_measured_after_a_look(store, app, clock):
    store.gate = lambda sent: clock.sleep(0.5)
    with pytest.raises(CeleryTimeout):
        AsyncResult('id', app=app).get(timeout=0.3)
    assert clock.now == 0.5


def test_a_timeout_holds_for_groups_in_a_group(store, app, clock):
    inner = results_of(app, 'pending', 'ready too')
    group = GroupResult('outer', [AsyncResult('ready', app=app), inner], app=app)
    for task_id in 'ready', 'ready too':
        store.finish(task_id, task_id)
    with pytest.raises(CeleryTimeout):
        group.get(timeout=2)
    assert clock.now == 2
    store.finish('pending', 1)
    store.take_requests()
    assert group.get(timeout=0) == ['ready', [1, 'ready too']]
    assert len(store.take_requests()) == 3


def test_on_interval_is_called_after_each_pause_before_the_next_look(store, app, clock):
    seen = []
    clock.at(1.2, store.finish, 'id', 42)
    app.backend.wait_for('id', on_interval=lambda: seen.append((clock.now, len(store.sent))))
    assert seen == [(0.5, 1), (1.0, 2), (1.5, 3)]


def test_on_message_max_iterations_and_the_cache_are_as_in_celery(store, clock):
    app, messages = make_app(result_cache_max=10), []
    store.finish('a')
    store.finish('b', status='FAILURE')
    found = app.backend.get_many({'a', 'b', 'pending'}, None, 1, True, messages.append, None, 2)
    assert {task_id for task_id, _ in found} == {'a', 'b'}
    assert {meta['task_id'] for meta in messages} == {'a', 'b'}
    assert clock.slept == [1, 1]
    assert app.backend.is_cached('a') and app.backend.is_cached('b')
    assert list(app.backend.get_many([])) == []


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
            request = Context(message.headers, **embed)
            taken.append((message.headers['task'], args, request))
    return taken


def begin(app, size=3):
    """Applies a chord: the requests of its parts, the last of which it awaits, and its result."""
    add, total = app.tasks['add'], app.tasks['total']
    result = chord([add.s(number) for number in range(size)], app=app)(total.s())
    return [request for name, _, request in take_messages(app) if name == 'add'], result


def finish(app, part, value=1):
    app.backend.mark_as_done(part.id, value, part)


def left_behind(store, parts):
    """What is stored besides the results of the parts; a result of the body would be an error."""
    return set(store.objects) - {f'{TASK}{part.id}' for part in parts}


def bodies(app):
    return [args for name, args, _ in take_messages(app) if name == 'total']


def test_parts_that_end_in_order_cost_three_requests_each(store, app):
    parts, _ = begin(app, 200)
    assert store.count_requests() == {'PUT': 2}  # the group, and the note
    for number, part in enumerate(parts[:-1]):
        finish(app, part, number)
    assert store.count_requests() == {'PUT': 199, 'GET': 199}
    finish(app, parts[-1], 199)
    # Its result and the claim; the note, the group, the results; the group and the note.
    assert store.count_requests() == {'PUT': 2, 'GET': 2 + 200, 'DELETE': 2}
    assert bodies(app) == [[list(range(200))]]
    assert not left_behind(store, parts)


@pytest.mark.parametrize(('size', 'order'), [(20, 'any'), (100, 'any'), (100, 'last first')])
def test_a_part_in_any_order_costs_at_most_five_requests(store, app, monkeypatch, size, order):
    app.conf.CELERY_S3_BACKEND_SETTINGS = {'bucket': 'results', 'max_connections': 1}
    dice = random.Random(size)
    monkeypatch.setattr(random, 'sample', dice.sample)
    for _ in range(5):
        store.objects.clear()
        parts, _ = begin(app, size)
        if order == 'any':
            dice.shuffle(parts)
        else:
            parts.insert(0, parts.pop())
        for part in parts:
            finish(app, part)
        assert len(bodies(app)) == 1
    assert len(store.sent) / 5 <= 5 * size
    assert not left_behind(store, parts)


@pytest.mark.parametrize('at', range(9))
def test_a_part_whose_worker_dies_at_any_request_goes_on_when_it_comes_again(store, app, at):
    def die(sent):
        if len(store.sent) == at:
            store.gate = None
            raise KeyboardInterrupt  # nothing else runs, as in a process that is killed

    parts, result = begin(app, 2)
    finish(app, parts[0])
    store.take_requests()
    store.gate = die
    again = Context(vars(parts[1]))
    with contextlib.suppress(KeyboardInterrupt):
        finish(app, parts[1])
    assert (store.gate is None) == (at < 8)  # its result, note, group, two results, claim, DELETEs
    store.gate = None
    if at == 6:  # the body was sent, and runs before the part comes again
        store.finish(result.id)
    finish(app, again)
    assert len(bodies(app)) == 1
    assert at in (6, 7) or not left_behind(store, parts)


@pytest.mark.parametrize('sign', ['no record', 'a body that has begun', 'it ends', 'none'])
def test_a_second_delivery_sends_only_where_the_first_shows_no_life(store, app, clock, sign):
    parts, result = begin(app, 1)
    note = f'{CHORD}{parts[0].group}'
    store.objects[note] = f'{parts[0].id}\nsends\nnonce'.encode()
    if sign == 'no record':
        app.backend.delete_group(parts[0].group)
    elif sign == 'a body that has begun':
        store.finish(result.id, status='STARTED')
    elif sign == 'it ends':
        clock.at(20, store.objects.pop, note)
    finish(app, parts[0], 5)
    assert clock.slept == ([0] if sign in ('no record', 'a body that has begun') else [0, 30])
    assert bodies(app) == ([[[5]]] if sign == 'none' else [])


def test_a_result_that_cannot_be_decoded_fails_the_chord(store, app):
    parts, result = begin(app, 2)
    store.objects[f'{TASK}{parts[0].id}'] = b'of a class that only another worker has'
    finish(app, parts[1])
    assert 'Expecting value' in str(AsyncResult(result.id, app=app).result)
    assert not left_behind(store, parts) - {f'{TASK}{result.id}'}


def test_a_task_that_the_worker_does_not_know_ends_no_worker(store, app):
    polling = make_app({'bucket': 'results', 'conditional_writes': False})
    for number, backend in enumerate([app.backend, polling.backend]):
        request = Bunch(name='unknown', chord=None, root_id=None, errbacks=None)
        backend.mark_as_failure(str(number), NotRegistered('unknown'), request=request)
        assert backend.get_state(str(number)) == 'FAILURE'


def test_a_group_that_cannot_be_deleted_is_no_reason_to_send_the_body_again(store, app):
    parts, _ = begin(app, 1)
    store.fail_next('DELETE', refused(403, 'AccessDenied'), times=9)
    with pytest.raises(ClientError, match='AccessDenied') as error:
        finish(app, parts[0])
    app.backend.mark_as_failure(parts[0].id, error.value, request=parts[0])  # as Celery does then
    assert len(bodies(app)) == 1


def test_a_chord_whose_record_is_gone_fails_once(store, app):
    parts, result = begin(app, 1)
    app.backend.delete_group(parts[0].group)
    for part in parts[0], Context(vars(parts[0])):
        finish(app, part)
    with pytest.raises(ChordError, match='no longer exists'):
        AsyncResult(result.id, app=app).get()


@pytest.mark.parametrize('state', ['SUCCESS', 'FAILURE', 'REVOKED'])
@pytest.mark.parametrize('ignored', [True, False])
def test_a_part_that_ignores_its_result_has_it_stored_once(store, app, state, ignored):
    parts, result = begin(app, 2)
    parts[0].ignore_result = ignored
    app.backend.store_result('another task', 1, state, request=parts[0])
    store.take_requests()
    options = {'request': parts[0], 'store_result': not ignored}
    if state == 'SUCCESS':
        app.backend.mark_as_done(parts[0].id, 1, **options)
    elif state == 'FAILURE':
        app.backend.mark_as_failure(parts[0].id, ValueError('boom'), **options)
    else:
        app.backend.mark_as_revoked(parts[0].id, 'boom', **options)
    assert store.take_requests() == [f'PUT {TASK}{parts[0].id}', f'GET {CHORD}{parts[0].group}']
    assert app.backend.get_state(parts[0].id) == state
    finish(app, parts[1])
    assert len(bodies(app)) == (state == 'SUCCESS')
    app.backend.on_chord_part_return(Context(id='of no chord', group='g'), state, None)
    assert not [name for name in store.sent if 'of no chord' in name or name.endswith('-g')]


def test_without_conditional_writes_celery_polls_and_parts_ask_for_nothing(store):
    app = make_app({'bucket': 'results', 'conditional_writes': False})
    chord([app.tasks['add'].s(1)], app=app)(app.tasks['total'].s(), interval=7)
    part, unlock = (request for _, _, request in sorted(take_messages(app), key=lambda m: m[0]))
    assert (unlock.task, store.take_requests()) == ('celery.chord_unlock', [])
    part.ignore_result = True
    finish(app, part)
    assert store.take_requests() == [f'GET {TASK}{part.id}', f'PUT {TASK}{part.id}']


# A real Celery worker


@pytest.fixture(scope='module')
def working_app():
    """An app with a worker; each test brings a store of its own."""
    memory.Channel.queues.clear()
    app = make_app()
    with pytest.MonkeyPatch.context() as monkeypatch:
        clear_environment(monkeypatch)
        assert app.backend
    with start_worker(app, pool='solo', perform_ping_check=False):
        yield app


def fetch(result):
    return result.get(timeout=20, interval=0.01, disable_sync_subtasks=False)


def values(app):
    add, ignored, replaced, retried, total = (
        app.tasks[name].s for name in 'add ignored replaced retried total'.split()
    )
    pair = group(add(1), add(2), app=app)
    nested = add(1) | group(add(1) | pair, add(5), app=app)
    inner = chord([add(1), add(2)], total(), app=app)
    after = chord([total(), total()], total(), app=app)  # it takes what another chord gives
    return {
        'groups in chains in groups': (chord([nested], total()), 13),
        'a part that is retried': (chord([retried(1), add(2)], total()), 3),
        'a part replaced by a group': (chord([replaced('add'), add(3)], total()), 6),
        'a chord in a group in a chain': (chord([add(1) | group(inner)], total()), 5),
        'beside a task': (chord([add(1) | group(add(1), inner, app=app)], total()), 7),
        'in a body': (
            chord([chord([add(1)], group(after, total(), app=app)), add(1)], total()),
            4,
        ),
        'ignored': (chord([add(1), ignored(2)], total()), 3),
        'ignored, by name': (chord([add(1), app.signature('ignored', [2])], total()), 3),
    }


def errors(app):
    add, fail, replaced, total = (app.tasks[name].s for name in 'add fail replaced total'.split())
    broken = chord([add(1), fail()], total(), app=app)
    after = chord([total(), total()], total(), app=app)
    bodies = {
        'a group': group(total(), total(), app=app),
        'a chain in a group': group(total(), total() | add(1), app=app),
        'a chain alone in a group': group(total() | add(1), app=app),
        'a chord in a group': group(after, total(), app=app),
        'a chord': after,
        'a chain': total() | add(1),
    }
    ignored = fail().set(ignore_result=True)
    return {
        'an inner chord, first': chord([broken, add(1)], total()),
        **{
            f'an inner chord whose body is {name}': chord([add(1), chord([fail()], body)], total())
            for name, body in bodies.items()
        },
        'group | group': group(fail(), add(1), app=app) | bodies['a chain in a group'],
        'replaced by a group that fails': chord([replaced('fail'), add(1)], total()),
        'ignored': chord([ignored, add(1)], total()),
        'ignored, in a chain': chord([ignored | add(1).set(ignore_result=True)], total()),
    }


@pytest.mark.real_time
def test_chords_of_every_shape_give_their_value(store, working_app):
    for shape, (signature, value) in values(working_app).items():
        assert (shape, fetch(signature.apply_async())) == (shape, value)


@pytest.mark.real_time
def test_chords_of_every_shape_give_their_error(store, working_app):
    for shape, signature in errors(working_app).items():
        # A result's own get() would raise the error of a parent.
        for task in celery_s3.find_tasks([signature.apply_async()]):
            meta = working_app.backend.wait_for(task.id, timeout=20, interval=0.01)
            assert (shape, meta['status']) == (shape, 'FAILURE')
            assert 'boom' in str(meta['result'])


# The store's contract, live where CELERY_S3_TEST_URL names a bucket


@pytest.fixture
def live(request, monkeypatch):
    """The settings of a folder of its own in the live bucket, or in the stub."""
    if not LIVE_URL:
        request.getfixturevalue('store')
        yield {'bucket': 'results'}
        return
    monkeypatch.undo()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
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
    memory.Channel.queues.clear()
    app = make_app(live)
    with start_worker(app, pool='threads', concurrency=8, perform_ping_check=False):
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
