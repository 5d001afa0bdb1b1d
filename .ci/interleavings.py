"""Prove the chords of celery_s3: run every interleaving of its own code, on a store in memory.

Each delivery of a message is a thread that stops before each step; a depth-first search runs every
order, and of those that differ in steps that commute, one ('sleep sets'). An answer is lost, or a
worker dies and its message comes again, at each place in turn. A sleep outlasts all others.
"""

import json
import os
import re
import sys
import threading
import time
from collections import namedtuple
from copy import deepcopy

from celery import Celery, chord

sys.path.insert(0, os.getcwd())
import celery_s3

# Each letter is a part, as often as it is delivered. The fate befalls one step.
Scenario = namedtuple('Scenario', 'name parts fate failing starts silent', defaults=['', '', 1, 0])
SCENARIOS = [
    Scenario('two parts, one fails, a lost answer', 'AB', 'is lost', failing='A'),
    Scenario('two parts, a lost answer', 'AB', 'is lost'),
    Scenario('one part, its chord started twice', 'A', starts=2),
    Scenario('two parts, a death, the body stores no state', 'AB', 'dies', silent=1),
    Scenario('two parts, a death', 'AB', 'dies'),
    Scenario('two parts, the first delivered twice', 'AAB'),
    Scenario('two parts, the last delivered twice', 'ABB'),
    Scenario('three parts', 'ABC'),
    Scenario('one part delivered three times, a lost answer', 'AAA', 'is lost'),
    Scenario('two parts, their chord started twice', 'AB', starts=2),
]
SEARCHES = {'as listed': lambda ids, size: ids[:], 'reversed': lambda ids, size: ids[::-1]}
Choice = namedtuple('Choice', 'name fate key is_read')
BUCKET = celery_s3.Bucket('b', max_connections=1)  # so it starts no threads
vars(BUCKET).update(_lock=None, _session=None, _http=None)  # not used here, and not to be copied


class App(Celery):
    backend = property(lambda self: threading.current_thread().backend)

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        me = threading.current_thread()
        me.stop_before(f'sends {task_id} {args}')
        message = json.dumps([task_id, options.get('group_id'), options.get('chord')])
        for number in range(me.schedule.scenario.parts.count(task_id) or 1):
            Delivery(me.schedule, f'{task_id}{number + 1} from {me.name}', message)
        return self.AsyncResult(task_id)


class Delivery(threading.Thread):  # a new worker with a message or, without, who starts the chord
    def __init__(self, schedule, name, message):
        super().__init__(name=name, daemon=True)
        self.schedule, self.message, self.fate = schedule, message, ''
        self.backend = celery_s3.S3Backend(APP)
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        schedule.deliveries[name] = self
        self.start()
        self.has_stopped.acquire()

    def run(self):
        try:
            self.work(self.schedule.scenario)
        except Exception as error:
            self.schedule.lines.append(f'{self.name} raises {error!r}')
        finally:  # for SystemExit, too, which threads may end with
            self.step = ''
            self.has_stopped.release()

    def work(self, scenario):
        if not self.message:
            ids = sorted(set(scenario.parts))
            parts = [APP.signature('part').set(task_id=part) for part in ids]
            whole = chord(parts, APP.signature('body'), app=APP).set(task_id='header')
            return whole.apply_async(task_id='body')
        task_id, group_id, body = json.loads(self.message)
        request = celery_s3.Context(id=task_id, group=group_id, chord=body)
        if task_id == scenario.failing:
            self.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
        elif task_id != 'body' or not scenario.silent:
            self.backend.mark_as_done(task_id, f'result of {task_id}', request)
        self.stop_before('acknowledges its message')

    def stop_before(self, step, key=None, fates=('goes on', 'dies')):
        if self.fate != 'dies':  # else a block 'finally' is here, but the dead send nothing
            self.step, is_read = step, len(fates) == 1
            self.choices = [Choice(self.name, fate, key or self.name, is_read) for fate in fates]
            self.has_stopped.release()
            self.may_go.acquire()
            self.schedule.lines.append(f'{self.name} {self.fate}: {step}')
        if self.fate == 'dies':
            raise SystemExit

    def sleep(self, seconds):
        self.stop_before(f'sleeps {seconds} s')
        self.stop_before('wakes', fates=('goes on',))

    def go_on(self, fate):
        self.fate = fate
        self.may_go.release()
        self.has_stopped.acquire()


def send_once(bucket, request, operation, refusals, **kwargs):
    """Stands in for Bucket._send_once(), and answers as AWS does."""
    me, key = threading.current_thread(), request.url.rpartition('/')[2]
    condition = request.headers.get('If-Match') or request.headers.get('If-None-Match')
    # To lose a read's answer is to read later; to die before it, to die after the last write.
    fates = ('goes on',) if request.method == 'GET' else ('goes on', 'is lost', 'dies')
    me.stop_before(f'{request.method} {key} {condition}', key, fates)
    value = me.schedule.objects.get(key)
    if condition not in (None, f'"{hash(value)}"' if value else '*'):
        assert (412 if value else 'NoSuchKey') in refusals
        value = None
    elif request.method == 'PUT':
        value = me.schedule.objects[key] = request.data
    elif request.method == 'DELETE':
        me.schedule.objects.pop(key, None)
    me.schedule.lines[-1] += f' -> {value}'
    if me.fate == 'is lost':
        raise celery_s3.exceptions.ConnectionClosedError(endpoint_url=request.url)
    return value, value and str(hash(value))


class Schedule:  # one run of a scenario: its chord has been started, and its parts have been sent
    def __init__(self, scenario):
        self.scenario, self.fate = scenario, scenario.fate
        self.objects, self.deliveries, self.lines = {}, {}, []
        Delivery(self, 'start', message='')
        while self.deliveries['start'].step:
            self.deliveries['start'].go_on('goes on')
        if scenario.starts == 2:
            Delivery(self, 'second start', message='')

    def find_choices(self):
        stopped = [one for one in self.deliveries.values() if one.step]
        if all(one.step == 'wakes' for one in stopped):
            for one in stopped:
                one.step = 'has woken'
        awake = [one for one in stopped if one.step != 'wakes']
        fates = ('goes on', self.fate)
        found = [[choice for choice in one.choices if choice.fate in fates] for one in awake]
        # What commutes with whatever the others do needs no other order.
        alone = [own for own in found if len(own) == 1 and own[0].key == own[0].name]
        return alone[0] if alone else sum(found, [])

    def follow(self, path):
        """Take the path, then the first choices; whether no earlier run was the same."""
        done, depth = [], 0
        while choices := self.find_choices():
            if depth == len(path):
                path.append(([choice for choice in choices if choice not in done], done))
            untried, done = path[depth]
            if not untried:
                return False
            taken, depth = untried[0], depth + 1
            done = [choice for choice in done if commute(choice, taken)]
            one = self.deliveries[taken.name]
            one.go_on(taken.fate)
            self.fate = self.fate if taken.fate == 'goes on' else ''
            if taken.fate == 'dies':
                Delivery(self, f'{taken.name}, again', one.message)
        return self.is_right() or sys.exit('\n'.join([*self.lines, f'WRONG {[*self.objects]}']))

    def is_right(self):
        scenario, text = self.scenario, '\n'.join(self.lines)
        sent = re.findall(r'goes on: sends body \((.*),\)', text)
        values = [f'result of {part}' for part in sorted(set(scenario.parts))]
        counts = [0] if scenario.failing else range(1, scenario.starts + 1)
        # The one case in which it may be sent twice: nothing tells that the dead one has sent it.
        if scenario.silent and 'dies: DELETE celery-taskset' in text:
            counts = [2]
        stored = re.findall('PUT celery-task-meta-body .* -> b(.*)', text)
        right = 'boom' if scenario.failing else '"result of body"'
        is_stored = [right in one for one in stored] == [True] * (not scenario.silent)
        may_stay = scenario.starts == 2 or 'dies: ' in text
        is_clean = may_stay or all('task-meta' in key for key in self.objects)
        is_sent = len(sent) in counts and set(sent) <= {str(values)}
        return is_sent and is_stored and is_clean and 'raises' not in text


def commute(one, other):
    return one.name != other.name and (one.key != other.key or one.is_read and other.is_read)


def explore(scenario, deadline):  # until none is left or time is up: how many, and whether all
    path, ran = [], 0  # for each step: choices to try, and those of which all orders were run
    while time.monotonic() < deadline:
        schedule = Schedule(scenario)
        ran += schedule.follow(path)
        for one in schedule.deliveries.values():
            if one.step:
                one.go_on('dies')
        while path and len(path[-1][0]) < 2:
            path.pop()
        if not path:
            return ran, 'all'
        untried, done = path[-1]
        done.append(untried.pop(0))
    return ran, 'not all'


APP = App(broker='memory://', set_as_current=False)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # else threads wake each other slowly
celery_s3.logger.disabled = True
celery_s3.Bucket._send_once, celery_s3.Bucket = send_once, lambda: deepcopy(BUCKET)
celery_s3.random.uniform = lambda least, most: 0  # seconds between two attempts
time.sleep = lambda seconds: seconds and threading.current_thread().sleep(seconds)
runs = [(scenario, search) for scenario in SCENARIOS for search in SEARCHES]
deadline = time.monotonic() + float(sys.argv[2] if sys.argv[1:2] == ['--seconds'] else 300)
for number, (scenario, search) in enumerate(runs):
    celery_s3.random.sample, began = SEARCHES[search], time.monotonic()
    ran, end = explore(scenario, began + (deadline - began) / (len(runs) - number))
    took = time.monotonic() - began
    print(f'{scenario.name:45} {search:9} {ran:6} {end:8} {took:5.1f} s', flush=True)
