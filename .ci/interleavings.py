"""Prove the chords of celery_s3: walk through every interleaving of its own code, to the end.

What a delivery does next is determined by the answers that it has had: so the code is asked once
for each such history, and stopped at its next step. All else is a walk through states, each seen
once. At each place in turn, an answer is lost, or a worker dies and its message comes again."""

import json
import os
import sys
import time
from collections import defaultdict, namedtuple
from copy import deepcopy
from functools import cache
from hashlib import md5
from itertools import count
from types import SimpleNamespace

from celery import Celery, chord

sys.path.insert(0, os.getcwd())
import celery_s3

# A letter is a part, as often as it is delivered. Of the body, this is stored in the end. The
# chord is started as often as said; 0 means once, by a worker that does not die.
DONE = 'result of body'
Scenario = namedtuple('Scenario', 'name parts fates starts failing stored', defaults=[0, '', DONE])
SCENARIOS = [
    Scenario('two parts', 'AB', ['lost', 'lost lost', 'dies', 'dies dies', 'dies lost']),
    Scenario('one of two fails', 'AB', ['lost', 'dies'], failing='A', stored='boom'),
    Scenario('two, the body stores no state', 'AB', ['dies'], stored='None'),
    Scenario('one delivered twice, no state', 'AA', ['dies'], stored='None'),
    Scenario('one part, started twice', 'A', [''], starts=2),  # with 'dies' it ends wrong
    Scenario('one delivered three times', 'AAA', ['lost']),
    Scenario('the first of two delivered twice', 'AAB', ['', 'dies']),
    Scenario('the last of two delivered twice', 'ABB', ['', 'dies']),
    Scenario('three parts', 'ABC', ['', 'lost', 'dies']),
    Scenario('four parts', 'ABCD', ['']),
    Scenario('two parts, the starter may die', 'AB', ['dies'], starts=1),
    Scenario('two parts, started twice', 'AB', [''], starts=2),
]
ORDERS = {'as listed': list.sort, 'reversed': lambda ids: ids.sort(reverse=True)}
RESULT, RECORD, NOTE = 'celery-task-meta-', 'celery-taskset-meta-', 'chord-unlock-'
MISSING, LOST = 'NoSuchKey', 'done, but the answer is lost'
BUCKET = celery_s3.Bucket(bucket='b')
vars(BUCKET).update(_lock=None, _session=None, _http=None, _threads=SimpleNamespace(map=map))
# A state: the objects, the deliveries that have not ended, and a tally: the fates and nonces; what
# the chord sent; how much more of it, and whether leftovers, are explained by a death or a start.
Tally = namedtuple('Tally', 'lost deaths nonces sent more stays')
Stop = type('Stop', (BaseException,), {})  # it ends a run of the code before its next step


class Delivery:  # a history: a message, the answers so far, and the step that the code takes next
    def __init__(self, search, message, answers=()):
        self.search, self.message, self.answers = search, message, answers
        self.backend, self.steps, self.number = celery_s3.S3Backend(APP), [], next(search.numbers)
        Delivery.running = self
        try:
            self.work(search.scenario, *message)
            self.ask('ends', '')
        except Stop:  # the steps before are those of the shorter history
            assert not answers or search.deliver(message, answers[:-1]).steps == self.steps[:-1]
        except Exception as error:
            self.steps.append(('raises', repr(error)))
        self.step = self.steps[-1] if len(answers) < 100 else ('raises', 'it comes to no end')

    def __lt__(self, other):
        return self.number < other.number

    def work(self, scenario, task_id, body):
        if task_id == 'start':
            parts = [APP.signature('part').set(task_id=part) for part in sorted({*scenario.parts})]
            errback = APP.signature('errback').set(task_id='errback')
            whole = chord(parts, APP.signature('body').set(link_error=[errback]), app=APP)
            return whole.set(task_id='header').apply_async(task_id='body')
        request = celery_s3.Context(id=task_id, group='header', chord=json.loads(body))
        if task_id == scenario.failing:
            self.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
        else:
            self.backend.mark_as_done(task_id, f'result of {task_id}', request)

    def ask(self, *step):  # its answer; without one the code stops, and takes no step any more
        if len(self.steps) <= len(self.answers):
            self.steps.append(step)
        if len(self.steps) > len(self.answers):
            raise Stop
        return self.answers[len(self.steps) - 1]

    def after(self, answer):
        return self.search.deliver(self.message, (*self.answers, answer))


class App(Celery):
    backend = property(lambda self: Delivery.running.backend)
    now = staticmethod(lambda: SimpleNamespace(isoformat=lambda: '2026-11-29T00:00:00'))

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        message = (task_id, json.dumps(options.get('chord')))
        Delivery.running.ask('sends', task_id, str(args), message)
        return self.AsyncResult(task_id)


def send_once(bucket, request, operation, refusals):  # stands in for Bucket._send_once()
    condition = ''.join(f'{k}: {v}' for k, v in request.headers.items() if k.startswith('If-'))
    key = request.url.rpartition('/')[2]
    answer = Delivery.running.ask(request.method, key, request.data, condition)
    if answer == LOST:
        raise celery_s3.exceptions.ConnectionClosedError(endpoint_url=request.url)
    if isinstance(answer, str):
        assert answer in refusals, answer
        return None, None
    return answer, md5(answer or request.data).hexdigest()


def answer_as_s3(objects, method, key, value, condition):  # the answer, and the objects then
    others = dict(objects)
    found = others.pop(key, None)
    if method == 'GET':
        return found or MISSING, objects
    met = f'If-Match: "{md5(found).hexdigest()}"' if found else 'If-None-Match: *'
    if condition not in ('', met):
        return 'PreconditionFailed' if found else MISSING, objects
    return b'', frozenset([*others.items(), *[(key, value)] * (method == 'PUT')])


class Search:  # a walk through the states of a scenario
    def __init__(self, scenario, lost, deaths, deadline):
        self.scenario, self.deadline, self.seen, self.path = scenario, deadline, set(), []
        self.numbers, self.deliver = count(), cache(lambda *history: Delivery(self, *history))
        self.choose = cache(lambda *situation: [*self.find_choices(*situation)])
        starters = (self.deliver(('start', None)),) * max(1, scenario.starts)
        tally = Tally(lost, deaths, (), (), 0, False)
        self.visit([((), '', starters)], (frozenset(), starters, tally))

    def visit(self, steps, state):  # to which these steps lead, and all after it
        if time.monotonic() > self.deadline:
            return
        self.seen.add(state)
        self.path.append(steps)
        moves = [*self.find_moves(*state)]
        if not moves and not self.is_right(*state):
            end = f'{[one.step for one in state[1]]} {dict(state[0])} {state[2]}'
            sys.exit('\n'.join([f'WRONG: {self.scenario}', *tell(sum(self.path, [])), end]))
        for move in moves:
            if move[1] not in self.seen:
                self.visit(*move)
        self.path.pop()

    def find_moves(self, objects, deliveries, tally):  # steps to be taken next, the state after
        for one in dict.fromkeys(deliveries):
            place = deliveries.index(one)
            others = deliveries[:place] + deliveries[place + 1 :]
            for steps, after, then, later in self.choose(one, objects, tally):
                yield steps, (then, tuple(sorted(others + after)), later)
        # A pause outlasts what has begun, and the body. A part may be delivered after it.
        begun = [one for one in deliveries if one.answers or one.message[0] == 'body']
        if begun and all(one.step[0] == 'waits' for one in begun):
            after = [one.after('woken') for one in begun]
            others = [one for one in deliveries if one not in begun]
            yield [(begun, 'woken', after)], (objects, tuple(sorted(others + after)), tally)

    def find_choices(self, one, objects, tally):  # find_events(), and what nobody notices at once
        for event, after, *rest in self.find_events(one, objects, tally):
            step = ((one,), event, after)
            if after and after[0].step[0] in ('draws', 'sends', 'ends'):
                for steps, last, *rest_then in self.choose(after[0], *rest):
                    yield [step, *steps], last + after[1:], *rest_then
            else:
                yield [step], after, *rest

    def find_events(self, one, objects, tally):  # what may happen to it, what is there then
        kind, key, *details = one.step
        keys, name = dict(objects), one.message[0]
        answer, new, then, later = 'done', [], objects, tally
        if kind == 'draws':
            nonces = tuple(sorted([*tally.nonces, name]))
            answer, later = f'{name} {nonces.count(name)}', tally._replace(nonces=nonces)
        elif kind == 'sends' and key in self.scenario.parts:
            new = [self.deliver(details[1])] * self.scenario.parts.count(key)
        elif kind == 'sends':
            new = [self.deliver(details[1])] * (key == 'body' and self.scenario.stored == DONE)
            answer, later = 'sent', tally._replace(sent=(*tally.sent, key + details[0]))
        elif kind in ('GET', 'PUT', 'DELETE'):
            answer, then = answer_as_s3(objects, *one.step)
            if then != objects and name == 'start' and tally.sent:  # it starts what has ended
                more = tally.more + (NOTE in key and key not in keys)
                later = tally._replace(more=more, stays=True)
            if tally.lost and answer == b'':
                yield LOST, (one.after(LOST),), then, later._replace(lost=tally.lost - 1)
        if kind == 'ends':
            yield 'done', (), objects, tally
        elif kind not in ('waits', 'raises'):
            yield answer, (one.after(answer), *new), then, later
        # To die before a read is to die after the last write.
        is_mortal = one.answers and (name != 'start' or self.scenario.starts) and tally.deaths
        if is_mortal and kind not in ('GET', 'draws', 'raises'):
            has_sent = 'sent' in one.answers
            is_shown = RESULT + 'body' in keys or RECORD not in str(keys)
            more = tally.more + (has_sent and self.scenario.stored != DONE and not is_shown)
            later = Tally(tally.lost, tally.deaths - 1, *tally[2:4], more, tally.stays or has_sent)
            yield 'DIES', (self.deliver(one.message),), objects, later

    def is_right(self, objects, deliveries, tally):
        values = [f'result of {part}' for part in sorted({*self.scenario.parts})]
        call = "errback('body',)" if self.scenario.failing else f'body({values},)'
        is_stored = self.scenario.stored in str(dict(objects).get(RESULT + 'body'))
        is_sent = {*tally.sent} == {call} and len(tally.sent) <= 1 + tally.more
        is_clean = tally.stays or all(RESULT in key for key, value in objects)
        return not deliveries and is_stored and is_sent and is_clean


def tell(steps):  # who took which step, and what happened then, a line each
    names, numbers = defaultdict(list), count(1)
    for before, event, after in steps:
        here = [names[one].pop() for one in before]
        for name, one in zip(here, before):
            yield ' '.join(f'{text!s:.90}' for text in [name, *one.step, '->', event])
        here += [f'{one.message[0]}{next(numbers)}' for one in after[len(before) :]]
        for name, one in zip(here, after):
            names[one].append(name)


APP = App(broker='memory://', set_as_current=False)
celery_s3.logger.disabled = True
celery_s3.Bucket._send_once, celery_s3.Bucket = send_once, lambda: deepcopy(BUCKET)
celery_s3.uuid = lambda: Delivery.running.ask('draws', 'a nonce')
celery_s3.time = SimpleNamespace(sleep=lambda s: s and Delivery.running.ask('waits', f'{s} s'))
searches = [(one, fates, order) for one in SCENARIOS for fates in one.fates for order in ORDERS]
deadline = time.monotonic() + float(sys.argv[2] if sys.argv[1:2] == ['--seconds'] else 300)
late = 0
for number, (scenario, fates, order) in enumerate(searches):
    celery_s3.random = SimpleNamespace(shuffle=ORDERS[order], uniform=lambda least, most: 0)
    began = time.monotonic()  # the last ones take the longest, so each has three shares
    latest = min(began + 3 * (deadline - began) / (len(searches) - number), deadline)
    search = Search(scenario, fates.count('lost'), fates.count('dies'), latest)
    took = time.monotonic() - began
    late += began + took > latest
    end = f'{took:6.1f} s {"NOT ALL" if began + took > latest else "to the end"}'
    counts = f'{len(search.seen):7} states {next(search.numbers):5} runs'
    print(f'{scenario.name:32} {fates:9} {order:9} {counts} {end}', flush=True)
sys.exit(late)
