"""The rules of celery_s3, each on the wire: what is sent, and what comes back.

`CELERY_S3_TEST_URL='s3://bucket/prefix?endpoint_url=...' pytest` runs the store's contract (the
tests named `test_store_...`) against that live bucket; without it they run on `responses`.
"""

import gc
import hashlib
import hmac
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit
from xml.sax.saxutils import escape

import botocore.auth
import botocore.httpsession
import pytest
import requests
import responses
from botocore.awsrequest import AWSResponse
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
)
from celery import Celery, chain, chord, group, states
from celery.app.task import Context
from celery.contrib.testing.worker import start_worker
from celery.exceptions import BackendStoreError, ChordError, ImproperlyConfigured
from celery.result import AsyncResult, GroupResult
from kombu.transport import memory

import celery_s3
from celery_s3 import Bucket, S3Backend

LIVE_URL = os.environ.get('CELERY_S3_TEST_URL')
ENVIRONMENT = dict(os.environ)
SECRET = 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY'
PROBES = ['PUT celery-s3-probe', 'PUT celery-s3-probe', 'PUT celery-s3-probe']
TASK = 'celery-task-meta-'


# S3 on `responses`


def signature(request, secret=SECRET):
    """The Authorization that the request should carry, by the letter of AWS's specification.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    headers = {name.lower(): to_str(value) for name, value in request.headers.items()}
    scope, signed = re.search(
        r'Credential=[^/]+/([^,]+), SignedHeaders=([^,]+)', headers['authorization']
    ).groups()
    url = urlsplit(request.url)
    headers['host'] = url.netloc
    date, region, service, _ = scope.split('/')
    canonical = '\n'.join(
        [
            request.method,
            url.path,
            '&'.join(sorted(url.query.split('&'))),
            *(f'{name}:{headers[name].strip()}' for name in signed.split(';')),
            '',
            signed,
            hashlib.sha256(request.body or b'').hexdigest(),
        ]
    )
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    key = f'AWS4{secret}'.encode()
    for part in date, region, service, 'aws4_request':
        key = hmac.digest(key, part.encode(), 'sha256')
    to_sign = f'AWS4-HMAC-SHA256\n{headers["x-amz-date"]}\n{scope}\n{hashed}'
    return region, hmac.digest(key, to_sign.encode(), 'sha256').hex()


def to_str(value):
    return value.decode() if isinstance(value, bytes) else value


def refusal(status, code, message='', headers=None):
    body = (
        f'<Error><Code>{code}</Code><Message>{message}</Message><RequestId>R1</RequestId></Error>'
    )
    return status, {'x-amz-request-id': 'R1', **(headers or {})}, body


def lost(answer):
    """S3 does as it is told, but its answer gets lost."""
    answer()
    raise ConnectionClosedError(endpoint_url='lost')


def dropped(answer):
    raise ConnectionClosedError(endpoint_url='dropped')


def refused(status, code, headers=None):
    return lambda answer: refusal(status, code, headers=headers)


class Store:
    """A bucket in memory that answers as S3 does and checks every signature."""

    def __init__(self):
        self.objects, self.requests, self.calls, self.plan = {}, [], [], []
        self.conditions, self.page, self.region = 'honoured', 1000, 'us-east-1'
        self.now = datetime(2026, 11, 21, tzinfo=timezone.utc)
        self.gate, self.lock = None, threading.RLock()

    def __call__(self, request):
        url = urlsplit(request.url)
        key, query = unquote(url.path[1:]), dict(parse_qsl(url.query))
        name = f'LIST {query["prefix"]}' if query else f'{request.method} {key}'
        if self.gate:
            self.gate(name)
        with self.lock:
            self.requests.append(name)
            self.calls.append(request)
            planned = next((one for one in self.plan if re.match(one[0], name)), None)
            if planned:
                self.plan.remove(planned)

        def answer():
            with self.lock:
                return self.answer(request, key, query)

        return planned[1](answer) if planned else answer()

    def answer(self, request, key, query):
        if urlsplit(request.url).hostname.split('.')[0] != 'results':
            return refusal(404, 'NoSuchBucket')
        if '+' in request.url or quote(unquote(url := urlsplit(request.url).path), '/-._~') != url:
            return refusal(403, 'SignatureDoesNotMatch')  # S3 signs what it would have encoded
        region, expected = signature(request)
        if region != self.region:
            return refusal(
                400, 'AuthorizationHeaderMalformed', '', {'x-amz-bucket-region': self.region}
            )
        if expected not in to_str(request.headers['Authorization']):
            return refusal(403, 'SignatureDoesNotMatch')
        if query:
            return self.list(query)
        if request.method == 'GET':
            if key not in self.objects:
                return refusal(404, 'NoSuchKey')
            return 200, {'ETag': f'"{self.etag(key)}"'}, self.objects[key][0]
        if request.method == 'DELETE':
            self.objects.pop(key, None)
            return 204, {}, ''
        return self.put(key, request.body or b'', request.headers)

    def put(self, key, body, headers):
        absent, match = to_str(headers.get('If-None-Match')), to_str(headers.get('If-Match'))
        if self.conditions == 'unknown' and (absent or match):
            return refusal(501, 'NotImplemented')
        if self.conditions == 'honoured':
            if match and key not in self.objects:
                return refusal(404, 'NoSuchKey')
            if absent and key in self.objects or match and match != self.etag(key):
                return refusal(412, 'PreconditionFailed')
        self.objects[key] = body, self.now
        return 200, {'ETag': f'"{self.etag(key)}"'}, ''

    def etag(self, key):
        return hashlib.md5(self.objects[key][0]).hexdigest()

    def list(self, query):
        assert query['list-type'] == '2'
        encoded = query.get('encoding-type') == 'url'
        after = query.get('continuation-token', '')
        keys = sorted(k for k in self.objects if k.startswith(query['prefix']) and k > after)
        token = keys[self.page - 1] if len(keys) > self.page else ''
        found = ''.join(
            f'<Contents><Key>{escape(quote_plus(key, "/") if encoded else key)}</Key>'
            f'<LastModified>{self.objects[key][1]:%Y-%m-%dT%H:%M:%S.000Z}</LastModified></Contents>'
            for key in keys[: self.page]
        )
        more = f'<NextContinuationToken>{escape(token)}</NextContinuationToken>' if token else ''
        namespace = 'http://s3.amazonaws.com/doc/2006-03-01/'
        return 200, {}, f'<ListBucketResult xmlns="{namespace}">{found}{more}</ListBucketResult>'

    def count(self):
        """The requests since the last count, those of the store's one trial left out."""
        counted = [name for name in self.requests if name not in PROBES]
        self.requests.clear()
        return counted

    def kinds(self):
        return Counter(name.split()[0] for name in self.count())


class Clock:
    """Stands in for the module `time`: sleeping is free and recorded."""

    gmtime, strftime = staticmethod(time.gmtime), staticmethod(time.strftime)

    def __init__(self):
        self.now, self.slept = 1_795_219_200.0, []  # 2026-11-21 00:00 UTC

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith('AWS_') or name.lower().endswith('_proxy') or 'CA_BUNDLE' in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path / 'config'))
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'credentials'))
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'AKIAIOSFODNN7EXAMPLE')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', SECRET)
    monkeypatch.setattr('celery.utils.time.random.randrange', lambda stop: stop - 1)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(celery_s3, 'time', clock)
    return clock


@pytest.fixture
def wire(monkeypatch):
    """`responses` sees what `URLLib3Session` sends."""
    sessions = []

    def send(session, request):
        sessions.append(session)
        outgoing = requests.Request(
            request.method,
            request.url,
            {to_str(name): to_str(value) for name, value in request.headers.items()},
            data=request.body,
        )
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
def store(wire, clock):
    store = Store()
    for method in 'GET', 'PUT', 'DELETE':
        wire.add_callback(method, re.compile('https://[^/]+.amazonaws.com/'), callback=store)
    return store


def make_app(result_backend='celery_s3.S3Backend', settings=None, **conf):
    app = Celery('tests', broker='memory://', set_as_current=False)

    app.conf.update(
        result_backend=result_backend,
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

    app.noted = []

    @app.task(name='note', shared=False)
    def note(request, error, traceback):
        app.noted.append((request.id, type(error)))

    @app.task(name='total', shared=False)
    def total(numbers):
        return sum(numbers)

    return app


@pytest.fixture
def app():
    memory.Channel.queues.clear()
    return make_app()


@pytest.fixture
def backend(app):
    return app.backend


def configured(**settings):
    return make_app(settings={'bucket': 'results', **settings}).backend


# Configuration


@pytest.mark.parametrize(
    'name', ['celery_s3.S3Backend', 'celery_s3:S3Backend', 'celery_s3.backends.S3Backend']
)
def test_the_backend_answers_to_its_names(name):
    assert type(make_app(name).backend) is S3Backend


def test_the_name_of_celery_s3_1_can_be_imported():
    import celery_s3.backends

    assert celery_s3.backends.S3Backend is S3Backend


class OldStyle:
    CELERY_RESULT_BACKEND = 'celery_s3.S3Backend'
    CELERY_S3_BACKEND_SETTINGS = {'bucket': 'old-style', 'base_path': 'celery'}


@pytest.mark.parametrize('namespace', [None, 'CELERY'])
def test_settings_come_from_old_style_and_from_django_configuration(namespace):
    app = Celery(set_as_current=False)
    app.config_from_object(OldStyle, namespace=namespace)
    assert app.backend.as_uri() == 's3://old-style/celery/'


def test_the_url_wins_over_the_dict():
    url = (
        'celery_s3.S3Backend+s3://of-url/a%20b?aws_region=eu-west-1&max_attempts=7'
        '&encrypt_key=false&aws_access_key_id=A&aws_secret_access_key=B%2BC'
    )
    settings = {'bucket': 'of-dict', 'base_path': 'x', 'encrypt_key': True, 'max_connections': 3}
    bucket = make_app(url, settings).backend.bucket
    assert bucket.uri == 's3://of-url/a b/'
    assert bucket._place[0] == 'eu-west-1'
    assert (bucket.max_attempts, bucket.max_connections, bucket.headers) == (7, 3, {})
    assert bucket._session.get_credentials().secret_key == 'B+C'


def test_a_url_without_a_path_keeps_the_dicts_base_path():
    url = 'celery_s3.S3Backend+s3://of-url'
    assert make_app(url, {'base_path': 'kept'}).backend.as_uri() == 's3://of-url/kept/'


@pytest.mark.parametrize('base_path', ['/celery/', 'celery/', 'celery', '//celery//'])
def test_base_path_names_a_folder(base_path):
    assert configured(base_path=base_path).as_uri() == 's3://results/celery/'


def test_a_setting_of_none_is_not_set():
    assert configured(aws_access_key_id=None, max_attempts=None).bucket.max_attempts == 5


@pytest.mark.parametrize(
    ('settings', 'problem'),
    [
        ({}, 'bucket must name one'),
        ({'bucket': 'a/b'}, 'bucket must name one'),
        (['bucket'], 'CELERY_S3_BACKEND_SETTINGS: it is .* of the wrong type'),
        ({'bucket': 'b', 'buckt': 'x'}, "buckt is unknown .*'bucket'.*'max_attempts'"),
        ({'bucket': 'b', 'buckt': None}, 'buckt is unknown'),
        ({'bucket': 'b', 'max_attempts': 'many'}, 'max_attempts is .* of the wrong type'),
        ({'bucket': 'b', 'encrypt_key': 'maybe'}, 'encrypt_key is .* of the wrong type'),
        ({'bucket': 'b', 'headers': 'x-amz-tagging'}, 'headers is .* of the wrong type'),
        ({'bucket': 'b', 'aws_access_key_id': 'A'}, 'aws_secret_access_key go together'),
        ({'bucket': 'b', 'aws_secret_access_key': 'S'}, 'aws_access_key_id and'),
    ],
)
def test_bad_settings_are_named_before_any_request(settings, problem):
    with pytest.raises(ImproperlyConfigured, match=problem):
        assert make_app(settings=settings).backend


def test_a_number_below_one_counts_as_one(store):
    assert configured(max_attempts=0, max_connections='-1').bucket.max_attempts == 1
    assert configured(max_attempts=0, max_connections='-1').mget([b'missing']) == [None]
    assert store.requests == ['GET missing']


def test_no_secret_shows(store):
    backend = configured(
        aws_access_key_id='AKID', aws_secret_access_key=SECRET, aws_session_token='TOKEN'
    )
    store.plan.append(('GET', refused(400, 'ExpiredToken')))
    with pytest.raises(ClientError) as error:
        backend.get('key')
    with pytest.raises(ImproperlyConfigured) as typo:
        assert configured(aws_secret_acces_key=SECRET).bucket
    with pytest.raises(ImproperlyConfigured, match='bucket must name one') as userinfo:
        assert make_app(f'celery_s3.S3Backend+s3://KEY:{quote(SECRET)}@bucket').backend
    shown = [backend, backend.bucket, backend.as_uri(True)]
    shown += [error.value, typo.value, userinfo.value]
    assert not re.search(f'{SECRET}|TOKEN', ' '.join(map(repr, shown)) + str(error.value.response))


def test_constructing_sends_nothing_and_imports_no_boto3(wire):
    assert configured().as_uri() == 's3://results/'
    assert not wire.calls
    program = 'import celery_s3, sys; sys.exit("boto3" in sys.modules)'
    folder = os.path.dirname(celery_s3.__file__)
    assert subprocess.run([sys.executable, '-c', program], cwd=folder).returncode == 0


def test_the_backend_pickles_with_its_url():
    url = 'celery_s3.S3Backend+s3://of-url/folder'
    app = make_app(url)
    app.set_current()
    try:
        copied = pickle.loads(pickle.dumps(app.backend))
    finally:
        Celery(set_as_current=True)
    assert copied.as_uri() == 's3://of-url/folder/'


def test_lower_case_settings():
    app = Celery(set_as_current=False)
    app.conf.update(result_backend='celery_s3.S3Backend', s3_backend_settings={'bucket': 'lower'})
    assert app.backend.as_uri() == 's3://lower/'


def test_the_cause_of_a_bad_setting_is_chained():
    with pytest.raises(ImproperlyConfigured) as error:
        assert configured(max_attempts='many').bucket
    assert isinstance(error.value.__cause__, ValueError)


def test_pickle_kwargs(backend):
    assert backend.__reduce__((), {'expires': 5})[1][2] == {'expires': 5, 'url': None}


# The environment, as every AWS tool reads it


def test_the_region_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'eu-central-1')
    place = configured().bucket._place
    assert place == ('eu-central-1', 'https://results.s3.eu-central-1.amazonaws.com/')


def test_credentials_region_endpoint_and_ca_bundle_come_from_the_profile(monkeypatch, tmp_path):
    (tmp_path / 'config').write_text(
        '[profile worker]\nregion = sa-east-1\naws_access_key_id = PROFILEKEY\n'
        'aws_secret_access_key = x\nendpoint_url = http://store:9000/\nca_bundle = /ca.pem\n'
    )
    monkeypatch.setenv('AWS_PROFILE', 'worker')
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    bucket = configured().bucket
    assert bucket._place == ('sa-east-1', 'http://store:9000/results/')
    assert bucket._http._verify == '/ca.pem'
    assert bucket._session.get_credentials().access_key == 'PROFILEKEY'


def test_the_endpoint_comes_from_the_environment_and_a_setting_overrides(monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://any:1')
    assert configured().bucket._place[1] == 'http://any:1/results/'
    monkeypatch.setenv('AWS_ENDPOINT_URL_S3', 'http://s3:2')
    assert configured().bucket._place[1] == 'http://s3:2/results/'
    assert configured(endpoint_url='http://mine:3/').bucket._place[1] == 'http://mine:3/results/'
    monkeypatch.setenv('AWS_IGNORE_CONFIGURED_ENDPOINT_URLS', 'true')
    assert configured().bucket._place[1] == 'https://results.s3.us-east-1.amazonaws.com/'


def test_proxies_and_ca_bundles_come_from_the_environment(monkeypatch):
    monkeypatch.setenv('HTTPS_PROXY', 'http://proxy:3128')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/requests.pem')
    http = configured().bucket._http
    assert http._proxy_config.proxy_url_for('https://x') == 'http://proxy:3128'
    assert http._verify == '/requests.pem'
    monkeypatch.setenv('AWS_CA_BUNDLE', '/aws.pem')
    monkeypatch.setenv('NO_PROXY', '.amazonaws.com')
    http = configured().bucket._http
    assert http._proxy_config.proxy_url_for('https://x') is None
    assert http._verify == '/aws.pem'


def test_the_connections_are_quick_and_bounded():
    http = configured(max_connections=7).bucket._http
    assert (6, 1, 1) in http._socket_options  # TCP_NODELAY
    assert http._max_pool_connections == 7
    assert (http._timeout.connect_timeout, http._timeout.read_timeout) == (2, 5)


def test_certificates_are_verified_unless_told_otherwise():
    assert configured().bucket._http._verify is True


def test_the_region_setting_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'eu-central-1')
    assert configured(aws_region='eu-west-1').bucket._place[0] == 'eu-west-1'


# URLs and keys


@pytest.mark.parametrize(
    ('bucket', 'region', 'url'),
    [
        ('results', 'eu-west-1', 'https://results.s3.eu-west-1.amazonaws.com/'),
        ('results', 'cn-north-1', 'https://results.s3.cn-north-1.amazonaws.com.cn/'),
        ('results', 'us-gov-west-1', 'https://results.s3.us-gov-west-1.amazonaws.com/'),
        ('results', 'us-iso-east-1', 'https://results.s3.us-iso-east-1.c2s.ic.gov/'),
        ('my.results', 'eu-west-1', 'https://s3.eu-west-1.amazonaws.com/my.results/'),
        ('My_Results', 'us-east-1', 'https://s3.us-east-1.amazonaws.com/My_Results/'),
    ],
)
def test_the_url_fits_the_partition_and_the_bucket(bucket, region, url):
    assert configured(bucket=bucket, aws_region=region).bucket._place == (region, url)


def test_a_region_that_is_none_is_refused():
    with pytest.raises(ValueError, match='evil'):
        assert configured(aws_region='evil.example/').bucket


ODD_IDS = [
    'a b', 'a+b', '100%', 'a%2Fb', 'a?acl', 'a#b', 'a&b=c', '"quoted"', "it's", '<tag>', 'é', '☃',
    '𝄞', 'a//b', '/lead', 'trail/', 'back\\slash', '~', 'a;b,c:d@e!f$g*h(i)', '...', 'a..b', '.x',
]  # fmt: skip


@pytest.mark.parametrize('task_id', ODD_IDS)
def test_any_id_lands_at_exactly_its_key(store, backend, task_id):
    backend.set(backend.get_key_for_task(task_id), task_id)
    assert list(store.objects) == [TASK + task_id]
    assert backend.get(backend.get_key_for_task(task_id)) == task_id.encode()


@pytest.mark.parametrize(
    'task_id', ['a/../b', '/..', '/./x', 'a\nb', 'a\0', '\x1f', '\x7f', 'x' * 1009, 'é' * 505]
)
def test_an_id_that_is_not_safe_is_refused_before_anything_is_sent(store, backend, task_id):
    for use in (
        backend.get_result,
        backend.forget,
        lambda id: backend.store_result(id, 1, 'SUCCESS'),
    ):
        with pytest.raises(ValueError, match='no safe S3 key'):
            use(task_id)
    assert store.count() == []


def test_a_key_may_have_1024_bytes(store, backend):
    backend.set('é' * 512, b'')
    assert list(store.objects) == ['é' * 512]


def test_path_style_keys_are_under_the_bucket(wire):
    wire.get('http://store:9000/results/folder/a%20b', body=b'x')
    backend = configured(endpoint_url='http://store:9000', base_path='folder')
    assert backend.get('a b') == b'x'


@pytest.mark.parametrize('base_path', ['..', '../x', 'a/../b', 'a\nb', 'x' * 1009])
def test_a_folder_that_is_not_safe_is_refused(store, base_path):
    with pytest.raises(ValueError, match='no safe S3 key'):
        configured(base_path=base_path).get(TASK)
    assert store.requests == []


# Signing


def test_a_signature_to_the_letter(wire, monkeypatch):
    freeze(monkeypatch, datetime(2013, 5, 24))
    wire.put(
        'https://results.s3.us-east-1.amazonaws.com/test%24file.text', headers={'ETag': '"e"'}
    )
    configured(reduced_redundancy=True).set('test$file.text', 'Welcome to Amazon S3.')
    headers = wire.calls[0].request.headers
    assert headers['X-Amz-Date'] == '20130524T000000Z'
    assert headers['Authorization'] == (
        'AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, '
        'SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-storage-class, '
        'Signature=680d4b8aa6c4d8389afab1018c65aeb5252d12a316860e15cd3ce5d6d1672ad6'
    )
    assert headers['Authorization'].endswith(signature(wire.calls[0].request)[1])
    assert not [name for name in headers if 'checksum' in name.lower()]


def freeze(monkeypatch, now):
    if hasattr(botocore.auth, 'get_current_datetime'):
        monkeypatch.setattr(botocore.auth, 'get_current_datetime', lambda *_, **__: now)
    else:  # botocore before 1.40

        class Frozen(datetime):
            @classmethod
            def utcnow(cls):
                return now

        monkeypatch.setattr(botocore.auth.datetime, 'datetime', Frozen)


def test_each_attempt_is_signed_afresh_with_the_credentials_of_the_moment(store, backend):
    backend.get('x')
    keys = iter([('ROTATED', SECRET, 'token'), ('AGAIN', SECRET, None)])
    backend.bucket._session.get_credentials = lambda: Rotating(next(keys))
    store.plan.append(('GET', refused(503, 'SlowDown')))
    backend.get('x')
    old, first, second = (call.headers for call in store.calls)
    assert 'AKIAIOSFODNN7EXAMPLE' in old['Authorization']
    assert 'ROTATED' in first['Authorization'] and first['X-Amz-Security-Token'] == 'token'
    assert 'AGAIN' in second['Authorization'] and 'X-Amz-Security-Token' not in second


class Rotating:
    def __init__(self, keys):
        self.keys = keys

    def get_frozen_credentials(self):
        return ReadOnlyCredentials(*self.keys)


def test_without_credentials_the_error_says_so(store, monkeypatch):
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    backend = configured()
    with pytest.raises(NoCredentialsError):
        backend.get('x')
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'LATER')
    assert backend.get('x') is None  # they may come with time


def test_the_region_is_learned_once(store, backend):
    store.region = 'eu-west-1'
    assert backend.get('x') is None
    assert backend.get('x') is None
    hosts = [urlsplit(call.url).hostname for call in store.calls]
    assert hosts == ['results.s3.us-east-1.amazonaws.com'] + 2 * [
        'results.s3.eu-west-1.amazonaws.com'
    ]


@pytest.mark.parametrize(('status', 'code'), [(301, 'PermanentRedirect'), (307, 'Redirect')])
def test_a_redirect_names_the_region(store, backend, status, code):
    store.region = 'eu-west-1'
    store.plan.append(('GET', refused(status, code, {'x-amz-bucket-region': 'eu-west-1'})))
    assert backend.get('x') is None
    assert len(store.requests) == 2


def test_a_store_that_keeps_naming_another_region_is_an_error(store, backend):
    regions = itertools.cycle(['eu-west-1', 'us-east-1'])
    store.plan += [
        ('GET', refused(301, 'PermanentRedirect', {'x-amz-bucket-region': next(regions)}))
        for _ in range(9)
    ]
    with pytest.raises(ClientError, match='PermanentRedirect'):
        backend.get('x')
    assert len(store.requests) == 5


def test_a_session_token_is_sent(store):
    backend = configured(
        aws_access_key_id='AKID', aws_secret_access_key=SECRET, aws_session_token='TOKEN'
    )
    backend.get('x')
    assert to_str(store.calls[0].headers['X-Amz-Security-Token']) == 'TOKEN'


def test_credentials_are_looked_up_by_one_thread_at_a_time(store, backend):
    look_up, together = backend.bucket._session.get_credentials, threading.Barrier(2)
    met = []

    def meet():
        try:
            met.append(together.wait(0.02))  # nobody else may get here meanwhile
        except threading.BrokenBarrierError:
            together.reset()
        return look_up()

    backend.bucket._session.get_credentials = meet
    backend.mget([f'k{number}' for number in range(8)])
    assert met == []


def test_only_a_redirect_teaches_a_region(store, backend):
    store.plan.append(('GET', refused(403, 'AccessDenied', {'x-amz-bucket-region': 'eu-west-1'})))
    with pytest.raises(ClientError, match='AccessDenied'):
        backend.get('key')
    assert backend.bucket._place[0] == 'us-east-1'
    assert len(store.requests) == 1


# Get, set, delete, mget


def test_a_missing_key_is_none_and_costs_one_request(store, backend):
    assert backend.get('missing') is None
    assert store.requests == ['GET missing']


@pytest.mark.parametrize('value', ['text', 'é', b'\x80bytes', b'', b'x' * 5_000_000])
def test_values_come_back_as_bytes(store, backend, value):
    backend.set(b'key', value)
    assert backend.get(b'key') == (value.encode() if isinstance(value, str) else value)
    assert store.requests == ['PUT key', 'GET key']


def test_delete_is_one_request_even_of_a_missing_key(store, backend):
    store.plan.append(('DELETE', refused(404, 'NoSuchKey')))  # as some stores answer
    backend.delete('key')
    backend.set('key', 'x')
    backend.delete('key')
    assert store.objects == {}
    assert store.requests == ['DELETE key', 'PUT key', 'DELETE key']


def test_mget_keeps_the_order_and_asks_for_nothing_twice(store, backend):
    for number in range(20):
        backend.set(f'k{number}', str(number))
    store.requests.clear()
    keys = [f'k{number}' for number in (7, 3, 99, 11)]
    assert backend.mget(keys) == [b'7', b'3', None, b'11']
    assert sorted(store.requests) == ['GET k11', 'GET k3', 'GET k7', 'GET k99']
    assert backend.mget([]) == []


def test_mget_is_parallel_up_to_max_connections(store):
    backend = configured(max_connections=4)
    barrier = threading.Barrier(4)  # breaks unless four requests are on their way at once
    running, most = [], []

    def gate(name):
        running.append(name)
        most.append(len(running))
        barrier.wait(10)
        running.pop()

    store.gate = gate
    assert backend.mget([f'k{number}' for number in range(12)]) == [None] * 12
    assert max(most) <= 4 + 4  # a thread may begin before the last one is off the list


def test_put_headers(store):
    backend = configured(
        reduced_redundancy=True,
        encrypt_key='true',
        headers={'x-amz-server-side-encryption': 'aws:kms', 'x-amz-tagging': 'a=b'},
    )
    backend.set('key', 'x')
    backend.get('key')
    put, get = (call.headers for call in store.calls)
    assert put['x-amz-storage-class'] == 'REDUCED_REDUNDANCY'
    assert put['x-amz-server-side-encryption'] == 'aws:kms'
    assert put['x-amz-tagging'] == 'a=b'
    assert not [name for name in get if 'tagging' in name or 'storage' in name]


def test_encrypt_key_asks_for_aes256(store):
    configured(encrypt_key=True).set('key', 'x')
    assert store.calls[0].headers['x-amz-server-side-encryption'] == 'AES256'


@pytest.mark.parametrize('serializer', ['json', 'pickle', 'yaml', 'msgpack'])
def test_any_serializer(store, serializer):
    pytest.importorskip(
        'msgpack' if serializer == 'msgpack' else 'yaml' if serializer == 'yaml' else 'json'
    )
    backend = make_app(result_serializer=serializer, accept_content=[serializer]).backend
    backend.store_result('id', {'a': [1, 'é']}, 'SUCCESS')
    assert backend.get_result('id') == {'a': [1, 'é']}


@pytest.mark.skipif(not hasattr(S3Backend, 'prepare_compression'), reason='Celery 5.7')
def test_compressed_results(store):
    backend = make_app(result_compression='gzip').backend
    backend.store_result('id', 'x' * 10_000, 'SUCCESS')
    assert len(store.objects[f'{TASK}id'][0]) < 1000
    assert backend.get_result('id') == 'x' * 10_000


def test_a_join_fetches_the_results_in_parallel(store, app):
    for number in range(30):
        app.backend.store_result(str(number), number, 'SUCCESS')
    store.count()
    barrier = threading.Barrier(30)
    store.gate = lambda name: barrier.wait(5)  # breaks unless all are on their way at once
    results = GroupResult(
        'g', [AsyncResult(str(number), app=app) for number in range(30)], app=app
    )
    assert results.get(disable_sync_subtasks=False) == list(range(30))
    assert store.kinds() == {'GET': 30}


def test_a_group_is_saved_restored_and_deleted_with_one_request_each(store, app):
    group_result = GroupResult('gid', [AsyncResult('1', app=app)], app=app)
    group_result.save(backend=app.backend)
    assert GroupResult.restore('gid', backend=app.backend, app=app) == group_result
    group_result.delete(backend=app.backend)
    key = 'celery-taskset-meta-gid'
    assert store.requests == [f'PUT {key}', f'GET {key}', f'DELETE {key}']


@pytest.mark.parametrize(('status', 'code'), [(412, 'PreconditionFailed'), (404, 'NoSuchKey')])
def test_a_write_without_a_condition_is_never_taken_for_unmet(store, backend, status, code):
    store.plan.append(('PUT', refused(status, code)))
    with pytest.raises(ClientError, match=code):
        backend.set('key', 'x')


def test_an_absent_bucket_is_no_unmet_condition(store):
    bucket = configured(bucket='absent').bucket
    with pytest.raises(ClientError, match='NoSuchBucket'):
        bucket.put('key', b'', celery_s3.ABSENT)


def test_mget_has_a_thread_per_connection(store):
    barrier, threads = threading.Barrier(4), set()

    def gate(name):
        threads.add(threading.get_ident())
        barrier.wait(10)

    store.gate = gate
    configured(max_connections=4).mget([f'k{number}' for number in range(12)])
    assert len(threads) == 4


# Threads and forks


def test_threads_share_one_backend(store, app):
    assert app.backend.thread_safe and app.backend.bucket.is_conditional()
    with ThreadPoolExecutor(30) as threads:
        list(threads.map(lambda n: app.backend.store_result(str(n), n, 'SUCCESS'), range(90)))
        results = list(threads.map(lambda n: app.backend.get_result(str(n)), range(90)))
        assert len(set(threads.map(lambda _: id(app.backend), range(30)))) == 1
    assert results == list(range(90))
    assert store.requests.count('PUT celery-s3-probe') == 3


@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_fork_shares_neither_connections_nor_locks_nor_what_was_learned(store, wire, backend):
    backend.store_result('id', 1, 'STARTED')
    parent, begun, done = wire.sessions[-1], threading.Event(), threading.Event()

    def hold():
        with backend.bucket._lock:
            begun.set()
            done.wait()

    threading.Thread(target=hold).start()
    begun.wait()
    child = os.fork()
    if not child:
        status = 1
        try:
            worker = threading.Thread(target=backend.get_state, args=['id'], daemon=True)
            worker.start()
            worker.join(10)
            fresh = wire.sessions[-1] is not parent and backend.bucket.etags == {}
            status = 0 if fresh and not worker.is_alive() else 1
        finally:
            os._exit(status)
    done.set()
    assert os.waitpid(child, 0)[1] == 0
    backend.get_state('id')
    assert wire.sessions[-1] is parent


def test_a_backend_that_is_not_used_any_more_is_freed(wire):
    app = make_app()
    app.set_current()
    bucket = weakref.ref(pickle.loads(pickle.dumps(app.backend)).bucket)
    Celery(set_as_current=True)
    gc.collect()
    assert bucket() is None


def test_a_system_without_fork_does_without(store, monkeypatch):
    monkeypatch.delattr(os, 'register_at_fork')
    assert make_app().backend.get('key') is None


# Storing states


def test_a_first_state_is_one_put_that_must_find_nothing(store, backend):
    backend.store_result('id', 42, 'SUCCESS')
    assert store.count() == [f'PUT {TASK}id']
    assert store.calls[-1].headers['If-None-Match'] == '*'
    meta = json.loads(store.objects[f'{TASK}id'][0])
    assert (meta['status'], meta['result'], meta['task_id']) == ('SUCCESS', 42, 'id')


def test_each_later_state_of_this_process_is_one_put_on_the_last(store, backend):
    etags = []
    for state in 'STARTED', 'PROGRESS', 'PROGRESS', 'RETRY', 'SUCCESS':
        backend.store_result('id', {'n': len(etags)}, state)
        etags.append(store.etag(f'{TASK}id'))
    assert store.count() == [f'PUT {TASK}id'] * 5
    conditions = [call.headers.get('If-Match') for call in store.calls[-5:]]
    assert conditions == [None, *etags[:-1]]
    assert backend.get_state('id') == 'SUCCESS'


def test_poll_fetch_and_forget_cost_one_request_each(store, app):
    result = AsyncResult('id', app=app)
    assert result.state == 'PENDING'
    assert store.count() == [f'GET {TASK}id']
    app.backend.store_result('id', 42, 'SUCCESS')
    store.count()
    assert result.get() == 42
    assert store.count() == [f'GET {TASK}id']
    result.forget()
    assert store.count() == [f'DELETE {TASK}id']
    assert f'{TASK}id' not in store.objects


def late(state):
    return ValueError('late') if state in states.EXCEPTION_STATES else 'late'


@pytest.mark.parametrize('state', ['STARTED', 'RETRY', 'FAILURE', 'REVOKED', 'SUCCESS'])
@pytest.mark.parametrize('own', [True, False])
def test_nothing_replaces_a_success(store, app, state, own):
    app.backend.store_result('id', 'right', 'SUCCESS')
    backend = app.backend if own else make_app().backend
    store.count()
    backend.store_result('id', late(state), state)
    assert store.count() == [f'PUT {TASK}id', f'GET {TASK}id']
    assert AsyncResult('id', app=app).get() == 'right'


@pytest.mark.parametrize('state', ['STARTED', 'RETRY', 'FAILURE', 'REVOKED'])
def test_any_other_state_is_replaced(store, app, state):
    app.backend.store_result('id', late(state), state)
    other = make_app().backend
    store.count()
    other.store_result('id', 'right', 'SUCCESS')
    assert store.count() == [f'PUT {TASK}id', f'GET {TASK}id', f'PUT {TASK}id']
    assert AsyncResult('id', app=app).get() == 'right'


def test_what_another_process_stored_since_is_read_before_it_is_replaced(store, app):
    app.backend.store_result('id', None, 'STARTED')
    make_app().backend.store_result('id', 'right', 'SUCCESS')
    app.backend.store_result('id', ValueError('late'), 'FAILURE')
    assert AsyncResult('id', app=app).get() == 'right'


def test_a_state_that_was_forgotten_meanwhile_is_stored_again(store, app):
    app.backend.store_result('id', None, 'STARTED')
    make_app().backend.forget('id')
    app.backend.store_result('id', 'right', 'SUCCESS')
    assert AsyncResult('id', app=app).get() == 'right'


def test_nothing_is_remembered_of_a_task_that_is_ready(store, backend):
    for state in 'STARTED', 'FAILURE':
        backend.store_result('id', late(state), state)
        remembered = list(backend.bucket.etags)
        assert remembered == ([f'{TASK}id'] if state == 'STARTED' else [])


@pytest.mark.parametrize('states_', [['SUCCESS'], ['STARTED', 'SUCCESS'], ['STARTED', 'PROGRESS']])
def test_an_answer_lost_after_the_write_ends_in_the_right_state(store, app, states_):
    for number, state in enumerate(states_):
        store.plan.append((f'PUT {TASK}', lost))
        app.backend.store_result('id', number, state)
        assert AsyncResult('id', app=app).state == state
    store.count()
    app.backend.store_result('id', 'next', 'PROGRESS')
    ready = states_[-1] == 'SUCCESS'
    assert AsyncResult('id', app=app).state == ('SUCCESS' if ready else 'PROGRESS')
    assert store.count()[0] == f'PUT {TASK}id'


def test_after_a_lost_answer_the_next_state_still_takes_one_request(store, backend):
    store.plan.append((f'PUT {TASK}', lost))
    backend.store_result('id', None, 'STARTED')
    store.count()
    backend.store_result('id', 1, 'SUCCESS')
    assert store.count() == [f'PUT {TASK}id']


def test_a_write_lost_to_a_success_while_its_answer_was_on_the_way(store, app):
    def overtaken(answer):
        answer()
        make_app().backend.store_result('id', 'right', 'SUCCESS')
        raise ConnectionClosedError(endpoint_url='lost')

    store.plan.append((f'PUT {TASK}', overtaken))
    app.backend.store_result('id', None, 'STARTED')
    assert AsyncResult('id', app=app).get() == 'right'


def test_eight_at_once_leave_one_valid_value(store):
    backends = [make_app().backend for _ in range(8)]
    for backend in backends:
        backend.bucket.is_conditional()
    barrier = threading.Barrier(8, timeout=10)

    def gate(name):
        if name.startswith('PUT') and not barrier.broken:
            try:
                barrier.wait(0.2)
            except threading.BrokenBarrierError:
                pass

    store.gate = gate
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda b: b.store_result('id', backends.index(b), 'SUCCESS'), backends))
        list(threads.map(lambda b: b.store_result('id', backends.index(b), 'FAILURE'), backends))
    assert backends[0].get_state('id') == 'SUCCESS'
    assert backends[0].get_result('id') in range(8)


def test_others_who_never_stop_writing_are_an_error(store, backend):
    store.plan += [(f'PUT {TASK}', refused(412, 'PreconditionFailed'))] * 99
    store.objects[f'{TASK}id'] = b'{"status": "PROGRESS", "result": 1}', store.now
    with pytest.raises(BackendStoreError, match='others keep writing it') as error:
        backend.store_result('id', 1, 'SUCCESS')
    assert (error.value.state, error.value.task_id) == ('SUCCESS', 'id')


@pytest.mark.parametrize('conditions', ['ignored', 'unknown'])
def test_a_store_without_conditions_is_not_trusted(store, app, caplog, conditions):
    store.conditions = conditions
    caplog.set_level('INFO', 'celery_s3')
    app.backend.store_result('id', None, 'STARTED')
    app.backend.store_result('id', 'right', 'SUCCESS')
    app.backend.store_result('id', ValueError('late'), 'FAILURE')
    assert AsyncResult('id', app=app).get() == 'right'
    trials = store.requests.count('PUT celery-s3-probe')
    assert caplog.messages == ['s3://results/ honours conditional writes: False']
    assert trials == (2 if conditions == 'ignored' else 1)
    reads_and_writes = [f'GET {TASK}id', f'PUT {TASK}id'] * 2 + [f'GET {TASK}id'] * 2
    assert store.count() == reads_and_writes
    assert 'If-None-Match' not in store.calls[-3].headers


@pytest.mark.parametrize(('known', 'trials'), [(False, 3), (True, 2)])
def test_trust_costs_a_process_two_requests_and_a_bucket_one(store, backend, known, trials):
    if known:
        store.objects['celery-s3-probe'] = b'', store.now
    for number in range(3):
        backend.store_result(str(number), 1, 'SUCCESS')
    assert store.requests.count('PUT celery-s3-probe') == trials


def test_a_store_that_ignores_if_match_alone_is_not_trusted(store, backend):
    put = store.put
    store.put = lambda key, body, headers: put(
        key, body, {name: value for name, value in headers.items() if name != 'If-Match'}
    )
    assert backend.bucket.is_conditional() is False


@pytest.mark.parametrize(('status', 'code'), [(503, 'SlowDown'), (403, 'RequestTimeTooSkewed')])
def test_an_error_at_the_first_store_does_not_decide_for_good(store, backend, status, code):
    store.plan += [('PUT celery-s3-probe', refused(status, code))] * 5
    with pytest.raises(ClientError, match=code):
        backend.store_result('1', 1, 'SUCCESS')
    store.plan.clear()
    assert store.count() == []
    backend.store_result('2', 2, 'SUCCESS')
    assert store.count() == [f'PUT {TASK}2']


def test_a_late_process_does_not_build_on_the_success_it_found(store, app):
    app.backend.store_result('id', 'right', 'SUCCESS')
    other = make_app().backend
    for state in 'STARTED', 'RETRY', 'FAILURE':
        other.store_result('id', late(state), state)
    assert AsyncResult('id', app=app).get() == 'right'
    assert other.bucket.etags == {}


def test_states_carry_the_headers_too(store):
    backend = configured(encrypt_key=True, headers={'x-amz-tagging': 'a=b'})
    for state in 'STARTED', 'SUCCESS':
        backend.store_result('id', 1, state)
    first, second = (call.headers for call in store.calls[-2:])
    assert first['If-None-Match'] == '*' and second['If-Match']
    for put in first, second:
        assert put['x-amz-server-side-encryption'] == 'AES256' and put['x-amz-tagging'] == 'a=b'


@pytest.mark.parametrize('conditions', ['honoured', 'ignored'])
def test_a_state_keeps_its_traceback_and_its_request(store, conditions):
    store.conditions = conditions
    backend = make_app(result_extended=True).backend
    request = Context(id='id', task='add', args=[1], kwargs={}, group='g', parent_id='p')
    backend.store_result('id', ValueError('boom'), 'FAILURE', 'line 1', request=request)
    meta = backend.get_task_meta('id')
    kept = [meta.get(name) for name in ('traceback', 'name', 'args', 'group_id', 'parent_id')]
    assert kept == ['line 1', 'add', [1], 'g', 'p']


def test_a_trial_that_cannot_be_sent_raises_and_decides_nothing(store, backend):
    store.plan += [('PUT celery-s3-probe', dropped)] * 5
    with pytest.raises(ConnectionClosedError):
        backend.store_result('1', 1, 'SUCCESS')
    backend.store_result('2', 2, 'SUCCESS')
    assert store.count() == [f'PUT {TASK}2']


def test_a_busy_state_is_written_in_the_end(store, backend):
    store.plan += [(f'PUT {TASK}', refused(412, 'PreconditionFailed'))] * 19
    store.objects[f'{TASK}id'] = b'{"status": "PROGRESS", "result": 1}', store.now
    backend.store_result('id', 2, 'SUCCESS')
    assert backend.get_result('id') == 2


# Chords


def messages(app):
    """Takes the messages off the queue: (task name, args, the request as the worker sees it)."""
    taken = []
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue('celery')
        while queue.qsize():
            message = queue.get(block=False)
            message.ack()
            args, _, embed = message.payload
            headers = message.headers
            request = Context(headers, **embed)
            request.errbacks = embed['errbacks']
            taken.append((headers['task'], args, request))
    return taken


def begin(app, size=3, body=None):
    """Applies a chord: the requests of its header tasks, and its result."""
    add, total = app.tasks['add'], app.tasks['total']
    result = chord([add.s(number) for number in range(size)], app=app)(body or total.s())
    parts = [request for name, _, request in messages(app) if name == 'add']
    assert len(parts) == size
    return parts, result


def finish(backend, part, value=1):
    backend.mark_as_done(part.id, value, part)


def markers(store):
    return [key for key in store.objects if '.done-' in key]


def test_a_chord_sends_its_body_once_all_parts_are_done(store, app):
    parts, result = begin(app)
    for part in parts[:2]:
        finish(app.backend, part, 10)
        assert messages(app) == []
    finish(app.backend, parts[2], 7)
    [(name, args, request)] = messages(app)
    assert (name, args, request.id) == ('total', [[10, 10, 7]], result.id)


@pytest.mark.parametrize('size', [10, 40])
def test_a_chord_part_costs_at_most_five_and_a_half_requests(store, app, size):
    parts, _ = begin(app, size)
    for part in parts:
        finish(app.backend, part)
    kinds = store.kinds()
    assert kinds == {
        'PUT': 1 + size + size + 1,  # the group, results, markers, the claim
        'LIST': size,
        'GET': 1 + size,  # the group, the join
        'DELETE': size + 2,  # markers, the group, and Celery's counter that never was
    }
    assert kinds.total() <= 5.5 * size


def test_a_chord_that_waits_sends_nothing_and_no_task_that_polls(store, app):
    parts, _ = begin(app)
    finish(app.backend, parts[0])
    store.count()
    assert messages(app) == []
    assert store.count() == []


def test_a_chord_leaves_one_small_object(store, app):
    parts, _ = begin(app)
    for part in parts:
        finish(app.backend, part)
    left = {k: v[0] for k, v in store.objects.items() if TASK not in k and 'probe' not in k}
    assert list(left) == [f'chord-unlock-{parts[0].group}.done']
    assert len(*left.values()) == 16


@pytest.mark.parametrize('order', sorted(set(itertools.permutations([0, 0, 1, 1]))))
def test_parts_delivered_twice_count_once(store, app, order):
    parts, _ = begin(app, 2)
    for number in order:
        finish(app.backend, parts[number])
    assert [name for name, _, _ in messages(app)] == ['total']
    assert markers(store) == []


def test_a_duplicate_long_after_costs_four_requests_and_leaves_nothing(store, app):
    parts, _ = begin(app)
    for part in parts:
        finish(app.backend, part)
    messages(app), store.count()
    finish(app.backend, parts[0])
    assert store.kinds() == {'PUT': 2, 'GET': 1, 'LIST': 1, 'DELETE': 1}  # two for the result
    assert messages(app) == []
    assert markers(store) == []


def test_parts_that_finish_at_the_same_instant_send_one_body(store, app):
    for _ in range(5):
        parts, _ = begin(app, 8)
        barrier = threading.Barrier(8, timeout=10)
        store.gate = lambda name, at=barrier: at.wait() if name.startswith('LIST') else None
        others = [make_app().backend for _ in parts]  # eight processes
        for other in others:
            other.app = app
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(finish, others, parts))
        assert [name for name, _, _ in messages(app)] == ['total']
        assert markers(store) == []


@pytest.mark.parametrize('times', [1, 2])
@pytest.mark.parametrize(
    'kind', ['PUT celery-task', 'PUT .*done-', 'LIST', 'PUT .*done$', 'DELETE']
)
def test_a_chord_survives_lost_answers(store, app, kind, times):
    parts, _ = begin(app)
    store.plan += [(kind, lost)] * times
    for part in parts:
        finish(app.backend, part)
    assert [name for name, _, _ in messages(app)] == ['total']
    assert markers(store) == []


def test_a_claim_of_somebody_else_after_a_dropped_connection_is_theirs(store, app):
    def overtaken(answer):
        finish(make_app_like(app).backend, parts[0])
        raise ConnectionClosedError(endpoint_url='dropped')

    parts, _ = begin(app, 1)
    store.plan.append(('PUT .*done$', overtaken))
    finish(app.backend, parts[0])
    assert [name for name, _, _ in messages(app)] == ['total']


def make_app_like(app):
    other = make_app()
    other.backend.app = app
    return other


def test_a_chord_of_more_parts_than_a_page_holds(store, app):
    store.page = 4
    parts, _ = begin(app, 11)
    for part in parts:
        finish(app.backend, part)
    assert [name for name, _, _ in messages(app)] == ['total']
    assert markers(store) == []


def test_a_group_id_that_begins_like_another_is_not_counted_with_it(store, app):
    parts, _ = begin(app, 2)
    other, _ = begin(app, 2)
    for part in other:
        part.group = f'{parts[0].group}0'
    finish(app.backend, parts[0])
    finish(app.backend, other[0])
    assert messages(app) == []


def test_a_failed_part_fails_the_body_and_is_named(store, app):
    parts, result = begin(app)
    finish(app.backend, parts[0])
    app.backend.mark_as_failure(parts[1].id, ValueError('boom'), request=parts[1])
    assert AsyncResult(result.id, app=app).state == 'PENDING'
    finish(app.backend, parts[2])
    with pytest.raises(ChordError, match=f"{parts[1].id} raised ValueError\\('boom'\\)"):
        AsyncResult(result.id, app=app).get()
    assert messages(app) == []
    assert markers(store) == []


def test_errbacks_run_when_a_part_fails(store, app):
    body = app.tasks['total'].s().on_error(app.tasks['note'].s())
    parts, result = begin(app, 1, body)
    app.backend.mark_as_failure(parts[0].id, ValueError('boom'), request=parts[0])
    assert app.noted == [(result.id, ChordError)]


def test_a_body_that_cannot_be_sent_is_reported(store, app, monkeypatch):
    parts, result = begin(app, 1)

    def unsendable(*_, **__):
        raise OSError('broker away')

    monkeypatch.setattr(type(app.tasks['total']), 'apply_async', unsendable)
    finish(app.backend, parts[0])
    with pytest.raises(ChordError, match='broker away'):
        AsyncResult(result.id, app=app).get()


def test_a_group_whose_record_is_gone_is_reported(store, app):
    parts, result = begin(app, 1)
    app.backend.delete_group(parts[0].group)
    finish(app.backend, parts[0])
    with pytest.raises(ChordError, match='no longer exists'):
        AsyncResult(result.id, app=app).get()


def test_a_chord_without_the_permission_to_list_says_so(store, app):
    parts, _ = begin(app, 1)
    store.plan.append(('LIST', refused(403, 'AccessDenied')))
    with pytest.raises(ClientError, match='s3:ListBucket may be missing: chords'):
        finish(app.backend, parts[0])


@pytest.mark.parametrize('conditions', ['ignored', 'unknown'])
def test_without_conditions_celerys_own_polling_runs_the_chord(store, app, conditions):
    store.conditions = conditions
    result = chord([app.tasks['add'].s(number) for number in range(2)], app=app)(
        app.tasks['total'].s()
    )
    sent = messages(app)
    assert sorted(name for name, _, _ in sent) == ['add', 'add', 'celery.chord_unlock']
    for name, _, request in sent:
        if name == 'add':
            finish(app.backend, request)
    assert messages(app) == []
    assert not [key for key in store.objects if key.startswith('chord-unlock')]
    assert result.state == 'PENDING'


def test_where_listing_may_be_denied_chords_poll(store, app):
    app.conf.CELERY_S3_BACKEND_SETTINGS = {'bucket': 'results', 'denied_is_missing': True}
    chord([app.tasks['add'].s(1)], app=app)(app.tasks['total'].s())
    assert sorted(name for name, _, _ in messages(app)) == ['add', 'celery.chord_unlock']


def test_a_group_at_the_end_of_a_chain_counts_with_all_its_tasks(store, app):
    add = app.tasks['add']
    header = [chain(add.s(1), group(add.s(2), add.s(3), app=app)), add.s(4)]
    chord(header, app=app)(app.tasks['total'].s())
    [size] = {request.chord['chord_size'] for _, _, request in messages(app) if request.chord}
    assert size == 3


def test_a_task_outside_of_any_chord_leaves_no_marker(store, app):
    app.tasks['add'].delay(1)
    [(_, _, request)] = messages(app)
    finish(app.backend, request)
    assert store.count() == [f'PUT {TASK}{request.id}']


def test_markers_are_deleted_in_parallel(store, app):
    parts, _ = begin(app, 8)
    barrier = threading.Barrier(8)
    store.gate = lambda name: barrier.wait(5) if re.match('DELETE .*done-', name) else None
    for part in parts:
        finish(app.backend, part)
    assert markers(store) == []


def test_the_body_is_sent_before_the_markers_go(store, app):
    parts, _ = begin(app, 1)
    store.plan.append(('DELETE .*done-', refused(403, 'AccessDenied')))
    with pytest.raises(ClientError, match='AccessDenied'):
        finish(app.backend, parts[0])
    assert [name for name, _, _ in messages(app)] == ['total']


def test_polling_keeps_its_options(store, app):
    store.conditions = 'ignored'
    parts = [app.tasks['add'].s(number) for number in range(2)]
    chord(parts, app=app)(app.tasks['total'].s(), interval=7, max_retries=3)
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue('celery')
        sent = [queue.get(block=False) for _ in range(3)]
    [unlock] = [one for one in sent if one.headers['task'] == 'celery.chord_unlock']
    assert unlock.payload[1]['interval'] == 7 and unlock.payload[1]['max_retries'] == 3


# Expiry


@pytest.mark.parametrize('global_keyprefix', ['', 'shop'])
def test_cleanup_deletes_what_has_expired_and_nothing_else(store, caplog, global_keyprefix):
    app = make_app(
        settings={'bucket': 'results', 'base_path': 'celery +é'},
        result_expires=timedelta(days=1),
        result_backend_transport_options={'global_keyprefix': global_keyprefix},
    )
    own = 'celery +é/shop_' if global_keyprefix else 'celery +é/'
    old, young = store.now - timedelta(days=1, seconds=1), store.now - timedelta(days=1)
    kinds = TASK, 'celery-taskset-meta-', 'chord-unlock-'
    for kind in kinds:
        store.objects[f'{own}{kind}old +é'] = b'', old
        store.objects[f'{own}{kind}young'] = b'', young
        store.objects[f'{kind}elsewhere'] = b'', old
        store.objects[f'celery +é/other_{kind}'] = b'', old
    store.objects['celery +é/other'] = store.objects['celery +é/celery-s3-probe'] = b'', old
    before = set(store.objects)
    caplog.set_level('INFO', 'celery_s3')
    app.backend.cleanup()
    assert before - set(store.objects) == {f'{own}{kind}old +é' for kind in kinds}
    assert [record.args[0] for record in caplog.records] == [1, 1, 1]


@pytest.mark.parametrize('expires', [None, 0])
def test_results_that_never_expire_are_not_even_listed(store, expires):
    make_app(result_expires=expires).backend.cleanup()
    assert store.requests == []


def test_cleanup_goes_page_by_page(store):
    store.page = 3
    for number in range(8):
        store.objects[f'{TASK}{number}'] = b'', store.now - timedelta(days=2)
    make_app().backend.cleanup()
    assert store.objects == {}
    lists = [at for at, name in enumerate(store.requests) if name == f'LIST {TASK}']
    assert lists == [0, 4, 8]  # three deletions after each page of three


def test_beat_has_a_task_for_it(store, app):
    store.objects[f'{TASK}old'] = b'', store.now - timedelta(days=2)
    app.tasks['celery.backend_cleanup']()
    assert store.objects == {}
    assert not app.backend.supports_autoexpire


def test_cleanup_deletes_in_parallel(store, backend):
    for number in range(8):
        store.objects[f'{TASK}{number}'] = b'', store.now - timedelta(days=2)
    barrier = threading.Barrier(8)
    store.gate = lambda name: barrier.wait(5) if name.startswith('DELETE') else None
    backend.cleanup()
    assert store.objects == {}


# Failures

TRANSIENT = [
    *(refused(status, 'Whatever') for status in (429, 500, 502, 503, 504)),
    refused(400, 'RequestTimeout'),
    refused(409, 'ConditionalRequestConflict'),
    dropped,
    lambda answer: (503, {}, '<html>busy</html>'),
    lambda answer: (500, {}, ''),
]


@pytest.mark.parametrize('fault', TRANSIENT)
@pytest.mark.parametrize('method', ['GET', 'PUT', 'DELETE', 'LIST'])
def test_what_may_pass_is_tried_again(store, backend, clock, caplog, fault, method):
    use = {
        'GET': lambda: backend.get('key'),
        'PUT': lambda: backend.set('key', 'x'),
        'DELETE': lambda: backend.delete('key'),
        'LIST': lambda: list(backend.bucket.list('key')),
    }[method]
    store.plan += [(method, fault)] * 4
    use()
    assert store.requests == [f'{method} key'] * 5
    assert clock.slept == [0.2, 0.4, 0.8, 1.6]  # full jitter's longest
    assert len(caplog.records) == 4


def test_a_retry_is_logged_with_method_key_and_reason(store, backend, caplog):
    store.plan.append(('GET', refused(503, 'SlowDown')))
    backend.get('key')
    [message] = caplog.messages
    assert message.startswith('GET s3://results/key again in 0.2 s: An error occurred (SlowDown)')


@pytest.mark.parametrize(
    ('status', 'code'),
    [
        (403, 'AccessDenied'),
        (404, 'NoSuchBucket'),
        (400, 'ExpiredToken'),
        (409, 'OperationAborted'),
    ],
)
def test_what_will_not_pass_is_not_tried_again(store, backend, status, code):
    store.plan.append(('', refused(status, code)))
    with pytest.raises(ClientError) as error:
        backend.get('key')
    assert error.value.response['Error']['Code'] == code
    assert ('s3:ListBucket' in str(error.value)) is (status == 403)
    assert not backend.exception_safe_to_retry(error.value)
    assert store.requests == ['GET key']


@pytest.mark.parametrize('fault', [refused(503, 'SlowDown'), dropped])
def test_an_endless_outage_ends_after_five_attempts(store, backend, clock, fault):
    store.plan += [('GET', fault)] * 99
    with pytest.raises((ClientError, ConnectionClosedError)) as error:
        backend.get('key')
    assert backend.exception_safe_to_retry(error.value)
    assert len(store.requests) == 5
    assert sum(clock.slept) == 3.0


def test_an_outage_of_timeouts_ends_within_30_seconds_after_five_attempts(store, clock):
    start = clock.now

    def blackhole(answer):
        clock.now += celery_s3.TIMEOUT[1]
        raise ReadTimeoutError(endpoint_url='s3')

    store.plan += [('GET', blackhole)] * 99
    with pytest.raises(ReadTimeoutError):
        configured(max_attempts=99).get('key')
    assert len(store.requests) == 5
    assert clock.now - start <= 30


def test_an_outage_of_refused_connections_ends_within_30_seconds(store, clock):
    start = clock.now
    store.plan += [('GET', dropped)] * 99
    with pytest.raises(ConnectionClosedError):
        configured(max_attempts=99).get('key')
    assert len(store.requests) > 10
    assert 22 < clock.now - start <= 30


@pytest.mark.parametrize('body', ['', 'half'])
def test_a_body_cut_short_is_a_dropped_connection(wire, clock, body):
    url = 'https://results.s3.us-east-1.amazonaws.com/key'
    wire.get(url, body=body, headers={'Content-Length': '8'}, auto_calculate_content_length=False)
    wire.get(url, body='complete', headers={'Content-Length': '8'})
    assert configured().get('key') == b'complete'
    assert len(wire.calls) == 2


TRANSPORT = {'endpoint_url': 'e', 'error': 'x', 'proxy_url': 'p'}


@pytest.mark.parametrize(
    ('error', 'transient'),
    [
        (ConnectionClosedError(**TRANSPORT), True),
        (ConnectTimeoutError(**TRANSPORT), True),
        (EndpointConnectionError(**TRANSPORT), True),
        (ProxyConnectionError(**TRANSPORT), True),
        (ReadTimeoutError(**TRANSPORT), True),
        (SSLError(endpoint_url='e', error='EOF occurred in violation of protocol'), True),
        (SSLError(endpoint_url='e', error='The handshake operation timed out'), True),
        (SSLError(endpoint_url='e', error='[SSL: CERTIFICATE_VERIFY_FAILED]'), False),
        (HTTPClientError(error='no such scheme'), False),
        (ValueError('key'), False),
        (ClientError({'Error': {'Code': 'SlowDown'}}, 'GET'), False),
        (ClientError({'ResponseMetadata': {'HTTPStatusCode': 503}}, 'GET'), True),
        (ClientError({'Error': {'Code': 'RequestTimeout'}}, 'GET'), True),
        (ClientError({}, 'GET'), False),
    ],
)
def test_exactly_transient_faults_are_safe_to_retry(backend, error, transient):
    assert backend.exception_safe_to_retry(error) is transient


def test_a_bad_certificate_is_tried_once(store, backend):
    def distrusted(answer):
        raise SSLError(endpoint_url='e', error='[SSL: CERTIFICATE_VERIFY_FAILED]')

    store.plan.append(('GET', distrusted))
    with pytest.raises(SSLError):
        backend.get('key')
    assert store.requests == ['GET key']


def test_always_retry_carries_a_result_through_a_long_outage(store):
    backend = make_app(result_backend_always_retry=True).backend
    backend._sleep = lambda seconds: None
    store.plan += [(f'PUT {TASK}', refused(503, 'SlowDown'))] * 23
    backend.store_result('id', 42, 'SUCCESS')
    assert backend.get_result('id') == 42


def test_an_error_tells_what_s3_said(store, backend):
    store.plan.append(('PUT', lambda answer: refusal(400, 'InvalidTag', 'The tag is bad')))
    with pytest.raises(ClientError) as error:
        backend.set('key', 'x')
    assert str(error.value) == (
        'An error occurred (InvalidTag) when calling the PUT s3://results/key operation: '
        'The tag is bad (HTTP 400, request id R1)'
    )
    assert error.value.response['ResponseMetadata']['HTTPStatusCode'] == 400


def test_a_missing_bucket_is_an_error_that_names_it(store, backend):
    store.plan.append(('GET', refused(404, 'NoSuchBucket')))
    with pytest.raises(ClientError, match=r'NoSuchBucket.*s3://results/key'):
        backend.get('key')


@pytest.mark.parametrize('page', ['<html>not found</html>', ''])
def test_a_404_that_is_not_s3s_is_an_error(store, backend, page):
    store.plan.append(('GET', lambda answer: (404, {}, page)))
    with pytest.raises(ClientError, match='HTTP 404'):
        backend.get('key')


def test_a_denied_read_speaks_of_listbucket(store, backend):
    store.plan += [(method, refused(403, 'AccessDenied')) for method in ('GET', 'PUT')]
    with pytest.raises(ClientError, match='s3:ListBucket may be missing'):
        backend.get('key')
    with pytest.raises(ClientError, match=r'request id R1\)$'):
        backend.set('key', 'x')


def test_denied_is_missing_where_the_setting_says_so(store):
    backend = configured(denied_is_missing=True)
    store.plan += [
        ('GET', refused(403, 'AccessDenied')),
        ('GET', refused(403, 'InvalidAccessKeyId')),
    ]
    assert backend.get('key') is None
    with pytest.raises(ClientError, match='InvalidAccessKeyId'):
        backend.get('key')
    store.plan.append(('PUT', refused(403, 'AccessDenied')))
    with pytest.raises(ClientError, match='AccessDenied'):
        backend.set('key', 'x')


def test_the_pauses_are_jittered(store, backend, clock, monkeypatch):
    monkeypatch.setattr('celery.utils.time.random.randrange', lambda stop: stop // 4)
    store.plan += [('GET', refused(503, 'SlowDown'))] * 2
    backend.get('key')
    assert clock.slept == [0.05, 0.1]


def test_an_error_without_a_message(store, backend):
    store.plan.append(('PUT', lambda answer: (400, {}, '<Error><Code>X</Code></Error>')))
    with pytest.raises(ClientError) as error:
        backend.set('key', 'x')
    assert 'operation:  (HTTP 400' in str(error.value)


# A real worker


@pytest.fixture
def worker(store, app):
    with start_worker(app, pool='threads', concurrency=4, perform_ping_check=False):
        yield app


def fetch(result):
    return result.get(timeout=20, interval=0.05, disable_sync_subtasks=False)


def test_a_worker_stores_what_its_client_reads(worker):
    add, fail, total = (worker.tasks[name] for name in ('add', 'fail', 'total'))
    assert fetch(add.delay(1, 2)) == 3
    with pytest.raises(ValueError, match='boom'):
        fetch(fail.delay())
    assert fetch(chain(add.s(1), add.s(2), add.s(3)).apply_async()) == 6
    assert fetch(group(add.s(number) for number in range(5)).apply_async()) == [0, 1, 2, 3, 4]


def test_a_worker_runs_chords_of_every_shape(worker):
    add, total = worker.tasks['add'], worker.tasks['total']
    pair = [add.s(1), add.s(2)]
    assert fetch((group(pair) | total.s()).apply_async()) == 3
    assert fetch(chord([chord(pair, total.s()), add.s(3)], total.s()).apply_async()) == 6
    assert fetch(chord([chain(add.s(1), add.s(1)), add.s(3)], total.s()).apply_async()) == 5
    assert fetch(chord([group(pair), add.s(3)], total.s()).apply_async()) == 6
    assert fetch(chord(pair, chain(total.s(), add.s(4))).apply_async()) == 7
    assert fetch(chord(pair, group(total.s(), total.s())).apply_async()) == [3, 3]


def test_fifty_chords_of_messages_delivered_twice_send_fifty_bodies(store, app, monkeypatch):
    put, bodies = memory.Channel._put, []

    def twice(channel, queue, message, **kwargs):
        put(channel, queue, message, **kwargs)
        if message['headers'].get('task') == 'total':
            bodies.append(message['headers']['id'])
        elif 'task' in message['headers']:
            put(channel, queue, json.loads(json.dumps(message)), **kwargs)

    monkeypatch.setattr(memory.Channel, '_put', twice)
    add, total = app.tasks['add'], app.tasks['total']
    with start_worker(app, pool='threads', concurrency=8, perform_ping_check=False):
        results = [chord([add.s(n), add.s(1), add.s(2)], app=app)(total.s()) for n in range(50)]
        assert [fetch(result) for result in results] == [n + 3 for n in range(50)]
    assert sorted(bodies) == sorted(result.id for result in results)
    assert markers(store) == []


# The store's contract, live where CELERY_S3_TEST_URL names a bucket

FINDINGS = []


@pytest.fixture
def live(request, monkeypatch):
    """A factory of apps that share a prefix of their own, on the live bucket or on the stub."""
    memory.Channel.queues.clear()
    if not LIVE_URL:
        request.getfixturevalue('store')
        yield make_app
        return
    monkeypatch.undo()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    url = urlsplit(LIVE_URL)
    url = url._replace(path=f'{url.path}/celery-s3-test-{uuid.uuid4().hex}').geturl()

    def factory(**conf):
        return make_app(f'celery_s3.S3Backend+{url}', {}, **conf)

    yield factory
    bucket = factory().backend.bucket
    for page in bucket.list(''):
        bucket.each(bucket.delete, list(page))


def found(sentence):
    FINDINGS.append(sentence)


def test_store_keeps_bytes(live):
    backend = live().backend
    for value in b'', b'\x00\xff', os.urandom(3_000_000):
        backend.set('key', value)
        assert backend.get('key') == value
    backend.delete('key')
    backend.delete('key')
    assert backend.get('key') is None
    found('keeps results, of several megabytes too, and forgets them')


def test_store_keeps_odd_keys_apart(live):
    bucket = live().backend.bucket
    for task_id in ODD_IDS:
        bucket.put(TASK + task_id, task_id.encode())
    assert bucket.each(lambda key: bucket.get(TASK + key)[0], ODD_IDS) == [
        task_id.encode() for task_id in ODD_IDS
    ]
    assert {key for page in bucket.list(TASK) for key in page} == {TASK + key for key in ODD_IDS}
    found(f'keeps {len(ODD_IDS)} odd keys apart and lists them as they are')


def test_store_lists_past_a_page(live):
    bucket = live().backend.bucket
    keys = [f'many/{number:04} +' for number in range(1005)]
    bucket.each(lambda key: bucket.put(key, b''), keys)
    pages = list(bucket.list('many/'))
    assert [key for page in pages for key in page] == keys
    assert all(re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d', at) for at in pages[0].values())
    found(f'lists {len(keys)} keys in {len(pages)} pages')


def test_store_refuses_what_its_conditions_forbid_or_is_not_trusted(live):
    apps = [live() for _ in range(8)]
    trusted = apps[0].backend.bucket.is_conditional()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda app: app.backend.store_result('id', 1, 'SUCCESS'), apps))
        list(threads.map(lambda app: app.backend.store_result('id', 2, 'FAILURE'), apps))
    for state in 'STARTED', 'PROGRESS', 'SUCCESS', 'FAILURE':
        apps[0].backend.store_result('other', state, state)
    assert apps[0].backend.get_result('id') == 1
    assert apps[0].backend.get_state('other') == 'SUCCESS'
    found(
        'honours conditional writes: a state is one PUT, no SUCCESS is ever overwritten'
        if trusted
        else 'has no conditional writes: a state is read, then written'
    )


def test_store_runs_chords(live):
    app = live()
    native = app.backend.bucket.is_conditional()
    with start_worker(app, pool='threads', concurrency=8, perform_ping_check=False):
        parts = [app.tasks['add'].s(number) for number in range(8)]
        results = [chord(parts, app=app)(app.tasks['total'].s()) for _ in range(3)]
        assert [fetch(result) for result in results] == [28, 28, 28]
    found('runs chords ' + ('without polling' if native else "with Celery's own polling"))


def test_store_expires_results(live):
    young, old = live(result_expires=3600).backend, live(result_expires=-3600).backend
    young.store_result('id', 1, 'SUCCESS')
    young.cleanup()
    assert young.get_result('id') == 1
    old.cleanup()
    assert young.get_state('id') == 'PENDING'
    found('dates its objects, so that cleanup() knows what has expired')


def test_store_refuses_a_wrong_secret(live):
    bucket = live().backend.bucket
    bucket.put('key', b'')
    bucket._session.set_credentials(bucket._session.get_credentials().access_key, 'wrong')
    try:
        bucket.get('key')
    except ClientError as error:
        assert error.response['ResponseMetadata']['HTTPStatusCode'] == 403
        found('refuses a wrong secret')
    else:
        assert LIVE_URL
        found('does not check signatures')


def test_store_tells_an_absent_bucket_from_an_absent_key(live):
    bucket = live().backend.bucket
    settings = {name: getattr(bucket, name) for name in celery_s3.DEFAULTS}
    with pytest.raises(ClientError, match='s3://celery-s3-absent-'):
        Bucket({**settings, 'bucket': f'celery-s3-absent-{uuid.uuid4().hex}'}).get('key')
    found('tells an absent bucket from an absent key')


@pytest.mark.skipif(not LIVE_URL, reason='CELERY_S3_TEST_URL is not set')
def test_store_report(capsys):
    with capsys.disabled():
        print(f'\n\nThe store at {urlsplit(LIVE_URL)._replace(query="").geturl()}')
        print('\n'.join(f'- {finding}' for finding in FINDINGS))
