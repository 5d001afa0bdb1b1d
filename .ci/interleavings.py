"""Prove the chords of celery_s3: run every interleaving of its own code, on a store in memory.

    python .ci/interleavings.py [--seconds N]

Run it in the root of a checkout; N is 300 unless told. Each delivery of a message is a thread that
stops before each step. A depth-first search decides who goes next, and begins again until every
order has been run; of orders that differ in steps that commute (on different keys, or both reads),
it ends one ('sleep sets'). Where a scenario says so, the answer to a write is lost after it took
effect, or a worker dies and its message comes again, at each place in turn. A sleep outlasts what
the others do. In the end the body was sent once with the right values, or has the right error, and
nothing but results is left (records may be, after a death or a second start).

There is a line for each scenario. A schedule that ends wrong is printed, and the exit is 1: each
line is what one delivery did, in this order; the last lines say what is wrong.
"""

import argparse
import json
import logging
import os
import sys
import threading
import time
from collections import namedtuple
from hashlib import md5
from types import SimpleNamespace

from botocore.exceptions import ConnectionClosedError
from celery import Celery, chord
from celery.app.task import Context

sys.path.insert(0, os.getcwd())
import celery_s3

# How often each part is delivered, what may befall one step, which part fails, how often the chord
# is started, whether the body stores no result.
FIELDS = 'name deliveries fate failing starts is_silent'
Scenario = namedtuple('Scenario', FIELDS, defaults=('', '', 1, False))
SCENARIOS = [
    Scenario('one part, its chord started twice', (1,), starts=2),
    Scenario('two parts, a lost answer', (1, 1), 'is lost'),
    Scenario('two parts, one fails, a lost answer', (1, 1), 'is lost', 'part-1'),
    Scenario('two parts, a death', (1, 1), 'dies'),
    Scenario('two parts, a death, a body without a state', (1, 1), 'dies', is_silent=True),
    Scenario('two parts, the first delivered twice', (2, 1)),
    Scenario('two parts, the last delivered twice', (1, 2)),
    Scenario('three parts', (1, 1, 1)),
    Scenario('one part delivered three times, a lost answer', (3,), 'is lost'),
    Scenario('two parts, their chord started twice', (1, 1), starts=2),
]
SEARCHES = {'as listed': lambda ids, size: ids[:], 'reversed': lambda ids, size: ids[::-1]}
APPS = []


class Died(BaseException):
    """The worker's process is gone: no code in it handles this."""


class App(Celery):
    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        me = threading.current_thread()
        me.stop_before(f'sends {task_id} {args}')
        message = json.dumps([task_id, options.get('group_id'), options.get('chord')])
        me.schedule.sent.append((f'{task_id} from {me.name}', message, args))
        return self.AsyncResult(task_id)


class Delivery(threading.Thread):
    """A message in a worker; it stops before each step until it is told to go on."""

    def __init__(self, schedule, name, app, work):
        super().__init__(name=name, daemon=True)
        self.schedule, self.app, self.work = schedule, app, work
        self.step, self.fate, self.sleeps = '', '', False
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    def run(self):
        try:
            function, *args = self.work
            function(self.app, *args)
        except Died:
            pass
        except Exception as error:
            self.schedule.wrong.append(f'WRONG: {self.name} raised {error!r}')
        self.step = ''
        self.has_stopped.release()

    def stop_before(self, step, key=None, fates=('goes on', 'dies')):
        if self.fate != 'dies':  # else a block 'finally' is here, but the dead send nothing
            self.step, self.key, self.fates = step, key or self.name, fates
            self.has_stopped.release()
            self.may_go.acquire()
        if self.fate == 'dies':
            raise Died
        self.schedule.lines.append(f'{self.name}: {step}')

    def go_on(self, fate):
        self.fate = fate
        self.may_go.release()
        self.has_stopped.acquire()


def send_once(bucket, request, operation, refusals, **kwargs):
    """Stands in for Bucket._send_once(), and answers as AWS does."""
    me, key = threading.current_thread(), request.url.rpartition('/')[2]
    is_read, is_new = request.method == 'GET', 'If-None-Match' in request.headers
    match = request.headers.get('If-Match', '').strip('"')
    condition = 'If-None-Match *' if is_new else match and f'If-Match {match[:5]}'
    # To lose a read's answer is to read later; to die before it, to die after the last write.
    fates = ('goes on',) if is_read else ('goes on', 'is lost', 'dies')
    me.stop_before(f'{request.method} {key} {condition}', key, fates)
    found = me.schedule.objects.get(key)
    etag = found and md5(found).hexdigest()
    is_missing = found is None and (is_read or match)
    if is_missing or (found is not None and (is_new or match not in ('', etag))):
        assert ('NoSuchKey' if is_missing else 412) in refusals
        found = etag = None
    elif request.method == 'PUT':
        found, etag = request.data, md5(request.data).hexdigest()
        me.schedule.objects[key] = found
        me.schedule.puts.append((key, found))
    elif request.method == 'DELETE':
        me.schedule.objects.pop(key, None)
    me.schedule.lines[-1] += f' -> {str(etag)[:5]} {str(found)[:60]}'
    if me.fate == 'is lost':
        me.schedule.lines[-1] += ' (the answer is lost)'
        raise ConnectionClosedError(endpoint_url=request.url)
    return found, etag


def sleep(seconds):
    """Stands in for time.sleep(); the pauses between attempts are 0 here."""
    me = threading.current_thread()
    if seconds:
        me.stop_before(f'sleeps {seconds} s')
        me.sleeps = True
        me.stop_before('wakes', fates=('goes on',))


def start_chord(app, size):
    parts = [app.signature('part', options={'task_id': f'part-{n + 1}'}) for n in range(size)]
    whole = chord(parts, app.signature('body'), app=app).set(task_id='header')
    whole.apply_async(task_id='body')


def work_on(app, message, scenario):
    task_id, group_id, body = json.loads(message)
    request = Context(id=task_id, group=group_id, chord=body)
    if task_id == scenario.failing:
        app.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
    elif task_id != 'body' or not scenario.is_silent:
        app.backend.mark_as_done(task_id, f'result of {task_id}', request)
    threading.current_thread().stop_before('acknowledges its message')


class Schedule:
    """One run of a scenario: its first start alone or, after that, what the parts do."""

    def __init__(self, scenario, first=None):
        self.scenario, self.size = scenario, len(scenario.deliveries)
        self.objects = dict(first.objects) if first else {}
        self.left = {'goes on': 999, 'is lost': 0, 'dies': 0, scenario.fate: 1}
        self.deliveries, self.sent, self.bodies = {}, [], []
        self.puts, self.lines, self.wrong = [], [], []
        if not first or scenario.starts == 2:
            self.begin('second start' if first else 'start', start_chord, self.size)
        for times, (name, message, _) in zip(scenario.deliveries, first.sent if first else ()):
            for number in range(times):
                self.begin(f'{name}, delivery {number + 1}', work_on, message, scenario)

    def begin(self, name, *work):
        """Deliver to a worker of its own, which knows as little as a new one."""
        if len(APPS) == len(self.deliveries):
            app = App(broker='memory://', set_as_current=False)
            app.conf.result_backend = 'celery_s3.S3Backend'
            app.conf.s3_backend_settings = {'bucket': 'b', 'max_connections': 1}
            APPS.append((app, dict(vars(app.backend.bucket))))
        app, fresh = APPS[len(self.deliveries)]
        vars(app.backend.bucket).update(fresh)
        app.backend.bucket.etags.clear()
        app.backend._cache.clear()
        self.deliveries[name] = Delivery(self, name, app, work)
        self.deliveries[name].start()
        self.deliveries[name].has_stopped.acquire()

    def find_choices(self):
        """What may come next, (delivery, fate): the keys it touches, whether it writes there."""
        stopped = [one for one in self.deliveries.values() if one.step]
        awake = [one for one in stopped if not one.sleeps]
        if not awake:
            for one in stopped:
                one.sleeps = False
        found = {}
        for one in awake or stopped:
            for fate in one.fates:
                if self.left[fate] and (fate != 'dies' or one.name.startswith('part')):
                    keys = {'goes on': {one.key}, 'is lost': {one.key, fate}, 'dies': {fate}}
                    found[one.name, fate] = keys[fate], len(one.fates) > 1
        return found

    def take(self, name, fate):
        one = self.deliveries[name]
        self.left[fate] -= 1
        if fate == 'dies':
            self.lines.append(f'{name}: dies, before: {one.step}')
        one.go_on(fate)
        if fate == 'dies':
            self.begin(f'{name}, again', *one.work)
        while self.sent:
            name, message, args = self.sent.pop(0)
            self.bodies += [args] if name.startswith('body') else []
            self.begin(name, work_on, message, self.scenario)

    def find_wrong(self):
        scenario = self.scenario
        stored = [json.loads(value) for key, value in self.puts if key == 'celery-task-meta-body']
        states = ['FAILURE' if scenario.failing else 'SUCCESS'] * (not scenario.is_silent)
        is_wrong_error = scenario.failing and 'boom' not in str(stored)
        if [meta['status'] for meta in stored] != states or is_wrong_error:
            self.wrong.append(f'WRONG: stored for the body: {stored}')
        values = [f'result of part-{number + 1}' for number in range(self.size)]
        counts = [0] if scenario.failing else range(1, scenario.starts + 1)
        # The one case in which it may be sent twice: nothing tells that the dead one has sent it.
        if scenario.is_silent and 'dies, before: DELETE celery-taskset' in str(self.lines):
            counts = [2]
        if len(self.bodies) not in counts or any(list(args) != [values] for args in self.bodies):
            self.wrong.append(f'WRONG: sent to the body: {self.bodies}')
        left = {key for key in self.objects if not key.startswith('celery-task-meta-')}
        if scenario.starts == 2 or (scenario.fate == 'dies' and not self.left['dies']):
            left -= {'celery-taskset-meta-header', 'chord-unlock-header'}
        if left:
            self.wrong.append(f'WRONG: left behind: {left}')
        return self.wrong


def commute(effect, other):
    return effect[0].isdisjoint(other[0]) or not (effect[1] or other[1])


def follow(schedule, path):
    """Take the path, and then what comes first; whether this is not the same as an earlier run.

    The path has, for each step, the choices and those among them of which every schedule has run,
    in some order; the first of the others is taken."""
    done = {}
    while choices := schedule.find_choices():
        depth = schedule.depth
        schedule.depth += 1
        if depth == len(path):
            path.append((choices, done))
        choices, done = path[depth]
        chosen = next((choice for choice in choices if choice not in done), None)
        if not chosen:
            return False
        schedule.take(*chosen)
        effect = choices[chosen]
        is_same = lambda name, other: name != chosen[0] and commute(effect, other)
        done = {choice: other for choice, other in done.items() if is_same(choice[0], other)}
    return True
