"""Prove the chords of celery_s3: run every interleaving of its own code, on a store in memory.

    python .ci/interleavings.py [--seconds N]

Run it in the root of a checkout; N is 300 unless told. Each delivery of a message is a thread that
stops before each step. A depth-first search decides who goes next, and begins again until every
order has been run; of orders that differ in steps that commute (on different keys, or both reads),
it runs one. Where a scenario says so, the answer to a write is lost after it took effect, or a
worker dies and its message comes again, at each place in turn. A sleep outlasts what the others
do. In the end the body was sent once with the right values, or has the right error, and nothing
but results is left (records may be, after a death or a second start).

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
from functools import cache, partial
from hashlib import md5
from types import SimpleNamespace

from botocore import auth, exceptions, httpsession, parsers
from celery import Celery, chord
from celery.app.task import Context

sys.path.insert(0, os.getcwd())
import celery_s3

# How often each part is delivered, what may befall one step, which part fails, how often the chord
# is started, whether the body stores no result.
FIELDS = 'name deliveries fate failing starts is_silent'
Scenario = namedtuple('Scenario', FIELDS, defaults=('', '', 1, False))
SCENARIOS = [
    Scenario('one part delivered three times, a lost answer', (3,), 'is lost'),
    Scenario('two parts, a lost answer', (1, 1), 'is lost'),
    Scenario('two parts, the first fails, a lost answer', (1, 1), 'is lost', 'part-1'),
    Scenario('two parts, the last fails, a lost answer', (1, 1), 'is lost', 'part-2'),
    Scenario('one part, its chord started twice', (1,), starts=2),
    Scenario('two parts, a death', (1, 1), 'dies'),
    Scenario('two parts, a death, a body without a state', (1, 1), 'dies', is_silent=True),
    Scenario('two parts, the first delivered twice', (2, 1)),
    Scenario('two parts, the last delivered twice', (1, 2)),
    Scenario('three parts', (1, 1, 1)),
    Scenario('two parts, each delivered twice', (2, 2)),
    Scenario('two parts, their chord started twice', (1, 1), starts=2),
]
SEARCHES = {'as listed': lambda ids, size: ids[:], 'reversed': lambda ids, size: ids[::-1]}
BODY = 'celery-task-meta-body'
APPS = []


class Died(BaseException):
    """The worker's process is gone: no code in it handles this."""


class Delivery(threading.Thread):
    """A message in a worker; it stops before each step until it is told to go on."""

    def __init__(self, schedule, name, app, work):
        super().__init__(name=name, daemon=True)
        self.schedule, self.app, self.work = schedule, app, work
        self.creator = len(schedule.trace) - 1  # the step that sent the message
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


def send(session, request):
    """Stands in for URLLib3Session.send(), and answers as AWS does."""
    me, key = threading.current_thread(), request.url.rpartition('/')[2]
    new, match = (request.headers.get(name, '') for name in ('If-None-Match', 'If-Match'))
    # To lose a read's answer is to read later; to die before it, to die after the last write.
    fates = ('goes on',) if request.method == 'GET' else ('goes on', 'is lost', 'dies')
    condition = f' If-Match {match[:7]}' if match else ' If-None-Match *' if new else ''
    me.stop_before(f'{request.method} {key}{condition}', key, fates)
    there, code = me.schedule.objects.get(key), ''
    if there is None and (match or request.method == 'GET'):
        code = 'NoSuchKey'
    elif there is not None and (new or match.strip('"') not in ('', md5(there).hexdigest())):
        code = 'PreconditionFailed'
    elif request.method == 'PUT':
        there = me.schedule.objects[key] = request.body
        me.schedule.puts.append((key, there))
    elif request.method == 'DELETE':
        me.schedule.objects.pop(key, None)
    status = {'NoSuchKey': 404, 'PreconditionFailed': 412}.get(code, 200)
    etag = f'"{md5(there or b"").hexdigest()}"'
    shown = code or f'{etag[:7]} {(there or b"")[:60].decode()}'.replace('\n', ' ')
    me.schedule.lines[-1] += f' -> {status} {shown}'
    if me.fate == 'is lost':
        me.schedule.lines[-1] += ' (the answer is lost)'
        raise exceptions.ConnectionClosedError(endpoint_url=request.url)
    value = there if request.method == 'GET' else b''
    content = f'<Error><Code>{code}</Code></Error>'.encode() if code else value
    return SimpleNamespace(status_code=status, headers={'etag': etag}, content=content)


def sleep(seconds):
    """Stands in for time.sleep(); the pauses between attempts are 0 here."""
    me = threading.current_thread()
    if seconds:
        me.stop_before(f'sleeps {seconds} s')
        me.sleeps = True
        me.stop_before('wakes', fates=('goes on',))


def send_task(app, name, args=None, kwargs=None, task_id=None, **options):
    """Stands in for Celery.send_task()."""
    me = threading.current_thread()
    me.stop_before(f'sends {task_id} {args}')
    message = json.dumps([task_id, options.get('group_id'), options.get('chord')])
    me.schedule.sent.append((f'{task_id} from {me.name}', message, args))
    return app.AsyncResult(task_id)


def work_on(app, message, scenario):
    task_id, group_id, body = json.loads(message)
    request = Context(id=task_id, group=group_id, chord=body)
    if task_id == scenario.failing:
        app.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
    elif task_id != 'body' or not scenario.is_silent:
        app.backend.mark_as_done(task_id, f'result of {task_id}', request)
    threading.current_thread().stop_before('acknowledges its message')


def start_chord(app, size):
    parts = [app.signature('part', options={'task_id': f'part-{n + 1}'}) for n in range(size)]
    whole = chord(parts, app.signature('body'), app=app).set(task_id='header')
    whole.apply_async(task_id='body')


class Schedule:
    """One run of a scenario: its first start alone or, after that, what the parts do."""

    def __init__(self, scenario, first=None):
        self.scenario, self.size = scenario, len(scenario.deliveries)
        self.objects = dict(first.objects) if first else {}
        self.left = {'goes on': 999, 'is lost': 0, 'dies': 0, scenario.fate: 1}
        self.deliveries, self.sent, self.trace, self.naps = {}, [], [], 0
        self.puts, self.bodies, self.lines, self.wrong = [], [], [], []
        if not first or scenario.starts == 2:
            self.begin('second start' if first else 'start', start_chord, self.size)
        for times, (_, message, _) in zip(scenario.deliveries, first.sent if first else ()):
            for number in range(times):
                name = f'{json.loads(message)[0]}, delivery {number + 1}'
                self.begin(name, work_on, message, scenario)

    def begin(self, name, work, *args):
        """Deliver to a worker of its own, which knows as little as a new one."""
        if len(APPS) == len(self.deliveries):
            app = Celery(broker='memory://', set_as_current=False)
            app.conf.result_backend = 'celery_s3.S3Backend'
            app.conf.s3_backend_settings = {'bucket': 'b', 'max_connections': 1}
            app.send_task = partial(send_task, app)
            APPS.append((app, dict(vars(app.backend.bucket))))
        app, fresh = APPS[len(self.deliveries)]
        vars(app.backend.bucket).update(fresh)
        app.backend.bucket.etags.clear()
        app.backend._cache.clear()
        self.deliveries[name] = Delivery(self, name, app, (work, *args))
        self.deliveries[name].start()
        self.deliveries[name].has_stopped.acquire()

    def choices(self):
        """What may come next, (delivery, fate): the keys it touches, whether it writes there."""
        stopped = [one for one in self.deliveries.values() if one.step]
        if stopped and all(one.sleeps for one in stopped):
            self.naps += 1
            for one in stopped:
                one.sleeps = False
        found = {}
        for one in stopped:
            for fate in one.fates if not one.sleeps else ():
                if self.left[fate] and (fate != 'dies' or one.name.startswith('part')):
                    keys = {'goes on': {one.key}, 'is lost': {one.key, fate}, 'dies': {fate}}[fate]
                    found[one.name, fate] = keys, len(one.fates) > 1
        return found

    def take(self, name, fate, effect):
        one = self.deliveries[name]
        self.trace.append((name, effect, one.creator, self.naps))
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
        stored = [json.loads(value) for key, value in self.puts if key == BODY]
        states = [meta['status'] for meta in stored]
        if states != (
            [] if scenario.is_silent else ['FAILURE' if scenario.failing else 'SUCCESS']
        ):
            self.wrong.append(f'WRONG: stored for the body: {stored}')
        if scenario.failing and 'boom' not in str(stored):
            self.wrong.append(f'WRONG: not the error of the part: {stored}')
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


class Node:
    """Where the search has a choice; `done` are those whose schedules have run, in some order."""

    def __init__(self, choices, done):
        self.choices, self.done = choices, done
        untried = [choice for choice in choices if choice not in done]
        # A delivery with all its fates; if those that go on have all been run, each death.
        living = [name for name, fate in untried if fate == 'goes on']
        self.wanted = set(living[:1] or [name for name, fate in untried])  # deliveries
        self.choose()

    def choose(self):
        untried = (one for one in self.choices if one[0] in self.wanted and one not in self.done)
        self.choice = next(untried, None)


def conflict(effect, other):
    return (effect[1] or other[1]) and not effect[0].isdisjoint(other[0])


def want_reversals(trace, nodes):
    """Where two steps conflict, let the later one come first in another schedule.

    'Source-DPOR' of https://doi.org/10.1145/2535838.2535845 (Abdulla and others, 2014).
    """
    past = []  # for each step, a bit for each one that must come before it
    for last, (name, effect, creator, naps) in enumerate(trace):
        races = []
        past.append(0)
        for step in reversed(range(last)):
            is_forced = name == trace[step][0] or step == creator or naps != trace[step][3]
            is_known = past[last] >> step & 1
            if not is_known and (is_forced or conflict(effect, trace[step][1])):
                past[last] |= past[step] | 1 << step
                races += [] if is_forced else [step]
        for step in races:
            apart = [n for n in range(step + 1, last) if not past[n] >> step & 1] + [last]
            bits = sum(1 << n for n in apart)
            could_be_next = [trace[n][0] for n in apart if not past[n] & bits]
            if nodes[step].wanted.isdisjoint(could_be_next):
                nodes[step].wanted.add(could_be_next[-1])


def explore(scenario, deadline):
    """Run schedules until none is left, one ends wrong or time is up: how many, and which."""
    first = Schedule(scenario)
    while first.deliveries['start'].step:
        first.deliveries['start'].go_on('goes on')
    nodes, ran = [], 0
    while time.monotonic() < deadline:
        schedule, done = Schedule(scenario, first), {}
        while choices := schedule.choices():
            depth = len(schedule.trace)
            if depth == len(nodes):
                if not choices.keys() - done.keys():
                    break  # whatever may follow has been run, in another order that is the same
                nodes.append(Node(choices, done))
            chosen = nodes[depth].choice
            effect = choices[chosen]
            schedule.take(*chosen, effect)
            done = {
                choice: other
                for choice, other in nodes[depth].done.items()
                if choice[0] != chosen[0] and not conflict(effect, other)
            }
        else:
            ran += 1
            if schedule.find_wrong():
                print(*schedule.lines, *schedule.wrong, sep='\n')
                return ran, 'wrong'
        for one in schedule.deliveries.values():
            if one.step:
                one.go_on('dies')
        want_reversals(schedule.trace, nodes)
        while nodes:
            node = nodes[-1]
            node.done[node.choice] = node.choices[node.choice]
            node.choose()
            if node.choice:
                break
            nodes.pop()
        else:
            return ran, 'all'
    return ran, 'stopped by time: not all'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=300)
    deadline = time.monotonic() + parser.parse_args().seconds
    if hasattr(os, 'sched_setaffinity'):  # threads wake each other much faster on one CPU
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        del os.environ[name]
    os.environ.update(AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b')
    logging.disable()
    httpsession.URLLib3Session.send = send
    auth.S3SigV4Auth.add_auth = lambda self, request: None  # 0.5 ms
    parsers.create_parser = cache(parsers.create_parser)
    celery_s3.time = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    runs = [(scenario, search) for scenario in SCENARIOS for search in SEARCHES]
    for number, (scenario, search) in enumerate(runs):
        celery_s3.random = SimpleNamespace(sample=SEARCHES[search], uniform=lambda a, b: 0)
        began = time.monotonic()
        ran, end = explore(scenario, began + (deadline - began) / (len(runs) - number))
        seconds = time.monotonic() - began
        print(f'{scenario.name:45} {search:9} {ran:7} {end:24} {seconds:6.1f} s', flush=True)
        if end == 'wrong':
            sys.exit(1)


main()
