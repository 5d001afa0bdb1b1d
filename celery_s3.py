"""Celery results in Amazon S3, over requests that botocore signs: no boto3, no client, no server.

result_backend = 'celery_s3.S3Backend'
CELERY_S3_BACKEND_SETTINGS = {'bucket': 'my-results'}
"""

import logging
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from socket import IPPROTO_TCP, TCP_NODELAY
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode, urlsplit
from weakref import ref
from xml.etree import ElementTree

from botocore import auth, awsrequest, configprovider, endpoint_provider, exceptions
from botocore import handlers, httpsession, parsers, session, utils
from celery.backends.base import KeyValueStoreBackend
from celery.exceptions import BackendStoreError, ImproperlyConfigured
from celery.utils.serialization import strtobool
from celery.utils.time import get_exponential_backoff_interval
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from kombu.utils.functional import LRUCache

__all__ = ('Bucket', 'S3Backend')
__version__ = '2.0.0'

DEFAULTS = dict.fromkeys(('bucket', 'base_path', 'aws_region', 'endpoint_url'), '')
DEFAULTS |= dict.fromkeys(('aws_access_key_id', 'aws_secret_access_key', 'aws_session_token'), '')
DEFAULTS |= dict.fromkeys(('reduced_redundancy', 'encrypt_key', 'denied_is_missing'), False)
DEFAULTS |= {'headers': {}, 'max_connections': 50, 'max_attempts': 5}
READERS = {str: str, bool: strtobool, int: lambda value: max(1, int(value)), dict: dict}

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
TRANSIENT = {429, 500, 502, 503, 504, 'RequestTimeout', 'ConditionalRequestConflict'}
DROPPED = exceptions.ConnectionError, exceptions.ConnectionClosedError, exceptions.ReadTimeoutError
TIMEOUT, PATIENCE = (2, 5), 22  # seconds: to connect, to wait; after which nothing is sent again
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
UNSAFE = re.compile(r'[\0-\x1f\x7f]|(^|/)\.\.?(/|$)')  # stores and proxies differ about these
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
ABSENT, NEVER, PROBE = {'If-None-Match': '*'}, {'If-Match': '0'}, 'celery-s3-probe'
logger = logging.getLogger(__name__)
parse_error = parsers.create_parser('rest-xml').parse


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, exceptions.ClientError):
        status = error.response.get('ResponseMetadata', {}).get('HTTPStatusCode')
        return status in TRANSIENT or error.response.get('Error', {}).get('Code') in TRANSIENT
    return isinstance(error, DROPPED) and 'CERTIFICATE_VERIFY_FAILED' not in str(error)


class Bucket:
    """A folder of an S3 bucket, for the threads of one process. Raises ClientError for what S3
    refuses, botocore's connection errors, and ValueError for a key that is not safe to send."""

    def __init__(self, settings: dict):
        vars(self).update(settings)
        self.folder = f'{self.base_path.strip("/")}/'.lstrip('/')
        self.uri = f's3://{self.bucket}/{self.folder}'
        reduced = {'x-amz-storage-class': 'REDUCED_REDUNDANCY'} if self.reduced_redundancy else {}
        encrypted = {'x-amz-server-side-encryption': 'AES256'} if self.encrypt_key else {}
        self.headers = reduced | encrypted | self.headers
        self.etags = LRUCache(limit=10_000)  # of the objects that this process may write again
        self._lock, self._conditional, self._session = threading.Lock(), None, session.Session()
        if self.aws_access_key_id:
            keys = self.aws_access_key_id, self.aws_secret_access_key, self.aws_session_token
            self._session.set_credentials(*keys)
        config = self._session.get_config_variable
        if not self.endpoint_url and not config('ignore_configured_endpoint_urls'):
            places = self._session.full_config, self._session.get_scoped_config(), 's3'
            self.endpoint_url = configprovider.ConfiguredEndpointProvider(*places).provide()
        self._locate(self.aws_region or config('region') or 'us-east-1')
        proxies, tcp = utils.get_environ_proxies(self._place[1]), [(IPPROTO_TCP, TCP_NODELAY, 1)]
        ca = config('ca_bundle') or os.environ.get('REQUESTS_CA_BUNDLE', True)
        self._http = httpsession.URLLib3Session(ca, proxies, TIMEOUT, self.max_connections, tcp)

    def get(self, key: str) -> tuple[bytes | None, str | None]:
        """The object's bytes and etag, or None and None where there is no such key."""
        missing = {'NoSuchKey', 'AccessDenied'} if self.denied_is_missing else {'NoSuchKey'}
        return self._send('GET', key, missing) or (None, None)

    def put(self, key: str, value: bytes, condition: dict | None = None) -> str | None:
        """Write the object: its etag, or None where the condition (a header) does not hold."""
        unmet, headers = {412, 'NoSuchKey'} if condition else (), self.headers | (condition or {})
        written = self._send('PUT', key, unmet, body=value, headers=headers)
        return written and written[1]

    def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        self._send('DELETE', key, {'NoSuchKey'})

    def each(self, function, keys: list) -> list:
        """The function's answers for all keys, in order, `max_connections` at a time."""
        with ThreadPoolExecutor(self.max_connections) as threads:
            return list(threads.map(function, keys))

    def list(self, prefix: str):
        """Yield pages: dicts of at most 1,000 keys and when S3 wrote them (ISO 8601, UTC)."""
        query = {'encoding-type': 'url', 'list-type': '2', 'prefix': self.folder + prefix}
        while query.get('continuation-token', True):
            page = ElementTree.fromstring(self._send('GET', query=query)[0])
            found = page.findall('{*}Contents')
            pairs = [(one.findtext('{*}Key'), one.findtext('{*}LastModified')) for one in found]
            yield {unquote_plus(key).removeprefix(self.folder): written for key, written in pairs}
            query['continuation-token'] = page.findtext('{*}NextContinuationToken')

    def is_conditional(self) -> bool:
        """Whether this process has seen the store refuse writes whose conditions do not hold."""
        if self._conditional is None:
            try:
                absent = any(self.put(PROBE, b'', ABSENT) is None for _ in range(2))
                self._conditional = absent and self.put(PROBE, b'', NEVER) is None
            except exceptions.ClientError as error:
                if error.response['ResponseMetadata']['HTTPStatusCode'] != 501:
                    raise
                self._conditional = False
            logger.info('%s honours conditional writes: %s', self.uri, self._conditional)
        return self._conditional

    def _locate(self, region: str) -> None:
        utils.validate_region_name(region)
        partitions = self._session.get_component('data_loader').load_data('partitions')
        partition = endpoint_provider.RuleSetStandardLibrary(partitions).aws_partition(region)
        name, host = self.bucket, f's3.{region}.{partition["dnsSuffix"]}'
        root = f'{name}.{host}' if utils.check_dns_name(name) else f'{host}/{name}'
        own = self.endpoint_url and f'{self.endpoint_url.rstrip("/")}/{name}/'
        self._place = region, own or f'https://{root}/'

    def _send(self, method: str, key='', accept=(), query=None, body=b'', headers=None):
        """S3's bytes and etag, or None where it says one of `accept`; repeats what may pass."""
        path, give_up = self.folder + key if key else '', time.monotonic() + PATIENCE
        if UNSAFE.search(path) or len(path.encode()) > 1024:
            raise ValueError(f'{path!r} is no safe S3 key: control characters, dots or length')
        path = quote(path, safe='/-._~') if key else f'?{urlencode(query, quote_via=quote)}'
        for attempt in range(1, self.max_attempts + 1):
            region, url = self._place
            request = awsrequest.AWSRequest(method, url + path, headers, body)
            try:
                return self._send_once(request, region, key, accept)
            except (exceptions.ClientError, *DROPPED) as error:
                again = is_transient(error) or self._place[0] != region
                if not again or attempt == self.max_attempts or time.monotonic() > give_up:
                    raise
                pause = get_exponential_backoff_interval(100, attempt, 2000, True) / 1000
                logger.warning('%s %s%s again in %s s: %s', method, self.uri, key, pause, error)
            time.sleep(pause)

    def _send_once(self, request, region, key, accept) -> tuple[bytes, str] | None:
        with self._lock:
            found = self._session.get_credentials()
        auth.S3SigV4Auth(found and found.get_frozen_credentials(), 's3', region).add_auth(request)
        response = self._http.send(request.prepare())
        status, headers, content = response.status_code, response.headers, response.content
        if len(content) != int(headers.get('content-length', len(content))):
            raise exceptions.ConnectionClosedError(endpoint_url=self.uri + key)  # cut short
        if status < 300:
            return content, headers.get('etag', '').strip('"')  # Ceph compares the bare etag
        answer = parse_error({'status_code': status, 'headers': headers, 'body': content}, None)
        error, request_id = answer['Error'], answer['ResponseMetadata'].get('RequestId')
        if status in accept or error.get('Code') in accept:
            return None
        if status in {301, 307, 400} and 'x-amz-bucket-region' in headers:
            self._locate(headers['x-amz-bucket-region'])
        error['Message'] = f'{error.get("Message") or ""} (HTTP {status}, request id {request_id})'
        if status == 403 and request.method == 'GET':
            error['Message'] += '; s3:ListBucket may be missing: chords and missing keys want it'
        raise exceptions.ClientError(answer, f'{request.method} {self.uri}{key}')


class S3Backend(KeyValueStoreBackend):
    """Celery's results, groups and chords in a `Bucket`; refuses wrong settings at once."""

    supports_native_join = supports_result_compression = implements_incr = True
    exception_safe_to_retry = staticmethod(is_transient)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.thread_safe, settings = True, self._read_settings()
        self.bucket = Bucket(settings)
        bucket = ref(self.bucket)  # a hook is for ever, a backend is not
        if hasattr(os, 'register_at_fork'):  # neither connections nor locks may cross a fork
            os.register_at_fork(after_in_child=lambda: bucket() and bucket().__init__(settings))

    def as_uri(self, include_password: bool = False) -> str:
        return self.bucket.uri

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        """Store a state in one PUT, unless somebody else wrote meanwhile; a SUCCESS stays."""
        key, bucket = bytes_to_str(self.get_key_for_task(task_id)), self.bucket
        if not bucket.is_conditional():
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)
        meta = self._get_result_meta(result, state, traceback, request)
        value = ensure_bytes(self.encode({**meta, 'task_id': bytes_to_str(task_id)}))
        etag = bucket.etags.data.pop(key, None)  # the cache's own pop is not atomic
        for _ in range(20):
            etag = bucket.put(key, value, {'If-Match': etag} if etag else ABSENT)
            found, etag = bucket.get(key) if etag is None else (value, etag)
            if found == value and state not in self.READY_STATES:
                bucket.etags[key] = etag
            if found == value or (found and self.decode_result(found)['status'] == 'SUCCESS'):
                return result
        raise BackendStoreError('others keep writing it, or hide it', state=state, task_id=task_id)

    def is_cached(self, task_id: str) -> bool:
        return True  # Celery asks before it names the failed part of a chord

    def cleanup(self) -> None:
        """Delete what S3 wrote more than `result_expires` seconds ago."""
        if not self.expires:
            return
        oldest = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(time.time() - self.expires))
        for prefix in self.task_keyprefix, self.group_keyprefix, self.chord_keyprefix:
            for page in self.bucket.list(bytes_to_str(prefix)):
                expired = [key for key, written in page.items() if written < oldest]
                self.bucket.each(self.bucket.delete, expired)
                logger.info('Deleted %d of %d objects', len(expired), len(page))

    def _apply_chord_incr(self, header_result_args, body, **kwargs):
        if self.bucket.denied_is_missing or not self.bucket.is_conditional():
            return super().apply_chord(header_result_args, body, **kwargs)  # it polls
        body['chord_size'] = sum(len(getattr(r, 'results', [r])) for r in header_result_args[1])
        super()._apply_chord_incr(header_result_args, body, **kwargs)

    def __reduce__(self, args=(), kwargs=None):
        return super().__reduce__(args, {**(kwargs or {}), 'url': self.url})

    def get(self, key: bytes | str) -> bytes | None:
        return self.bucket.get(bytes_to_str(key))[0]

    def mget(self, keys: list) -> list:
        return self.bucket.each(self.get, keys)

    def set(self, key: bytes | str, value: bytes | str) -> None:
        self.bucket.put(bytes_to_str(key), ensure_bytes(value))

    def delete(self, key: bytes | str) -> None:
        self.bucket.delete(bytes_to_str(key))

    def incr(self, key: bytes) -> int:
        return 1  # who comes this far has claimed the chord

    def on_chord_part_return(self, request, state, result, **kwargs):
        """Leave a marker of this part; who sees all markers and wins the claim sends the body."""
        size, bucket, me = request.chord.get('chord_size'), self.bucket, os.urandom(16)
        if not size:
            return None  # a chord that polls
        claim = f'{bytes_to_str(self.get_key_for_chord(request.group))}.done'
        bucket.put(f'{claim}-{request.id}', b'')
        keys = [key for page in bucket.list(claim) for key in page]
        if claim in keys:
            return bucket.delete(f'{claim}-{request.id}')  # of a task delivered twice
        if len(keys) >= size and (bucket.put(claim, me, ABSENT) or bucket.get(claim)[0] == me):
            request.chord['chord_size'] = 1  # what Celery waits for incr() to reach
            super().on_chord_part_return(request, state, result, **kwargs)
            bucket.each(bucket.delete, keys)

    def _read_settings(self) -> dict:
        conf, url, settings = self.app.conf, urlsplit(self.url or ''), dict(DEFAULTS)
        given = conf.get('CELERY_S3_BACKEND_SETTINGS') or conf.get('s3_backend_settings') or {}
        named, name = {'bucket': url.netloc, 'base_path': unquote(url.path)}, 'it'
        try:
            for name, value in [*given.items(), *named.items(), *parse_qsl(url.query)]:
                read, unset = READERS[type(DEFAULTS[name])], value in (None, '')
                settings[name] = settings[name] if unset else read(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f'{name} is unknown or of the wrong type; the settings are {DEFAULTS}'
            raise ImproperlyConfigured(f'CELERY_S3_BACKEND_SETTINGS: {problem}') from error
        if not handlers.VALID_BUCKET.search(settings['bucket']):
            raise ImproperlyConfigured('CELERY_S3_BACKEND_SETTINGS: bucket must name one')
        if bool(settings['aws_access_key_id']) != bool(settings['aws_secret_access_key']):
            raise ImproperlyConfigured('aws_access_key_id and aws_secret_access_key go together')
        return settings


backends = sys.modules[f'{__name__}.backends'] = sys.modules[__name__]  # celery-s3 1.x's name
