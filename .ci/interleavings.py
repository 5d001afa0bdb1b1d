"""Prove the chords of celery_s3: walk through every interleaving of its own code, to the end.

What a delivery of a message does next is determined by the answers that it has had so far. So the
code is asked once for each such history: it begins anew, is given these answers, and is stopped at
its next step. All else is a walk through states, of which none is visited twice. At each place in
turn an answer is lost, or a worker dies and its message is delivered again.
"""

import json
import os
import sys
import time
from collections import namedtuple
from copy import deepcopy
from hashlib import md5
from types import SimpleNamespace

from celery import Celery, chord

sys.path.insert(0, os.getcwd())
import celery_s3

# Each letter is a part, as often as its message is delivered. Without starters, the chord was
# started before; with two, the message of its starter was delivered twice.
Scenario = namedtuple(
    'Scenario', 'name parts lost deaths failing silent starters', defaults=[0, 0, '', False, 0]
)
SCENARIOS = [
    Scenario('one part delivered three times, a lost answer', 'AAA', lost=1),
    Scenario('two parts, a lost answer', 'AB', lost=1),
    Scenario('two parts, two lost answers', 'AB', lost=2),
    Scenario('the first of two fails, a lost answer', 'AB', lost=1, failing='A'),
    Scenario('the last of two fails, a lost answer', 'AB', lost=1, failing='B'),
    Scenario('the first of two fails, a death', 'AB', deaths=1, failing='A'),
    Scenario('the last of two fails, a death', 'AB', deaths=1, failing='B'),
    Scenario('the first of two delivered twice', 'AAB'),
    Scenario('the last of two delivered twice', 'ABB'),
    Scenario('the first of two delivered twice, a death', 'AAB', deaths=1),
    Scenario('the last of two delivered twice, a death', 'ABB', deaths=1),
    Scenario('two parts, a death', 'AB', deaths=1),
    Scenario('two parts, two deaths', 'AB', deaths=2),
    Scenario('two parts, a death and a lost answer', 'AB', lost=1, deaths=1),
    Scenario('two parts, a death, the body stores no state', 'AB', deaths=1, silent=True),
    Scenario('three parts', 'ABC'),
    Scenario('three parts, a lost answer', 'ABC', lost=1),
    Scenario('three parts, a death', 'ABC', deaths=1),
    Scenario('two parts, started twice', 'AB', starters=2),
    Scenario('two parts, a death, perhaps of the starter', 'AB', deaths=1, starters=1),
    Scenario('two parts, started twice, a death', 'AB', deaths=1, starters=2),
    Scenario('four parts', 'ABCD'),
]
ORDERS = {'as listed': lambda ids: ids.sort(), 'reversed': lambda ids: ids.sort(reverse=True)}
START = ('start', None, None)  # the message to who starts the chord
LOST = 'it is done, but the answer is lost'
BUCKET = celery_s3.Bucket(bucket='b')
# What is not used here; and no threads, so a look at several tasks is one after the other.
vars(BUCKET).update(_lock=None, _session=None, _http=None, _threads=SimpleNamespace(map=map))
# The objects, a pair of key and value each; the deliveries that have not ended; what was sent, the
# parts left out; how many more of these a death or a second start explains, and whether they
# explain that something is left in the bucket; what may still befall; how many nonces there are.
State = namedtuple('State', 'objects deliveries sent more stays lost deaths nonces')
Move = namedtuple('Move', 'delivery happening then state')  # `then` is what the delivery becomes


class Stop(BaseException):
    """Ends a run of the code before its next step."""


class Delivery:
    """A history: a message, the answers so far, and the step that the code takes next."""

    running = None
    count = 0

    def __init__(self, scenario, message, answers=()):
        self.scenario, self.message, self.answers = scenario, message, answers
        self.backend, self.steps, self.next = Backend(APP), [], {}
        Delivery.running, Delivery.count, self.number = self, Delivery.count + 1, Delivery.count
        try:
            self.work(*message)
            self.ask('ends')
        except Stop:
            pass
        except Exception as error:
            self.steps.append(('raises', repr(error)))
        self.step = self.steps[-1] if len(answers) < 100 else ('raises', 'it finds no end')
        self.has_sent = any(step[0] == 'sends' and step[1] != 'part' for step in self.steps[:-1])

    def work(self, task_id, group_id, body):
        if self.message == START:
            ids = sorted(set(self.scenario.parts))
            parts = [APP.signature('part').set(task_id=part) for part in ids]
            errback = APP.signature('errback').set(task_id='errback')
            whole = chord(parts, APP.signature('body').set(link_error=[errback]), app=APP)
            return whole.set(task_id='header').apply_async(task_id='body')
        request = celery_s3.Context(id=task_id, group=group_id, chord=json.loads(body))
        if task_id == self.scenario.failing:
            self.backend.mark_as_failure(task_id, ValueError('boom'), request=request)
        else:
            self.backend.mark_as_done(task_id, f'result of {task_id}', request)

    def ask(self, *step):
        """The answer to this step. Without one the code stops; what it does then is no step."""
        if len(self.steps) <= len(self.answers):
            self.steps.append(step)
        if len(self.steps) > len(self.answers):
            raise Stop
        return self.answers[len(self.steps) - 1]

    def after(self, answer):
        if answer not in self.next:
            then = Delivery(self.scenario, self.message, (*self.answers, answer))
            assert then.steps[: len(self.steps)] == self.steps, 'other steps after the same answers'
            self.next[answer] = then
        return self.next[answer]


class Backend(celery_s3.S3Backend):
    def _get_result_meta(self, *args, **kwargs):
        return {**super()._get_result_meta(*args, **kwargs), 'date_done': '2026-11-29T00:00:00'}


class App(Celery):
    backend = property(lambda self: Delivery.running.backend)

    def send_task(self, name, args=None, kwargs=None, task_id=None, **options):
        message = (task_id, options.get('group_id'), json.dumps(options.get('chord')))
        Delivery.running.ask('sends', name, str(args), message if name != 'errback' else None)
        return self.AsyncResult(task_id)


def send_once(bucket, request, operation, refusals):
    """Stands in for Bucket._send_once()."""
    condition = request.headers.get('If-Match') or request.headers.get('If-None-Match')
    key = request.url.rpartition('/')[2]
    answer = Delivery.running.ask(request.method, key, request.data, condition)
    if answer == LOST:
        raise celery_s3.exceptions.ConnectionClosedError(endpoint_url=request.url)
    if answer in refusals:
        return None, None
    if isinstance(answer, str):
        raise celery_s3.exceptions.ClientError({'Error': {'Code': answer}}, operation)
    return answer, md5(request.data if request.method == 'PUT' else answer).hexdigest()


def answer_as_s3(objects, method, key, value, condition):
    """What AWS answers, and the objects then."""
    found = objects.get(key)
    if method == 'GET':
        return 'NoSuchKey' if found is None else found, objects
    if method == 'DELETE':
        return b'', {other: objects[other] for other in objects if other != key}
    if condition == '*':
        is_refused = found is not None
    else:
        is_refused = condition and condition != f'"{md5(found or b"").hexdigest()}"'
    if is_refused:
        return 'NoSuchKey' if found is None else 'PreconditionFailed', objects
    return b'', {**objects, key: value}


class Search:
    """A walk through the states of a scenario."""

    def __init__(self, scenario):
        self.scenario, self.messages, Delivery.count = scenario, {}, 0
        starters = (self.deliver(START),) * max(1, scenario.starters)
        first = State(frozenset(), starters, (), 0, False, scenario.lost, scenario.deaths, 0)
        while not scenario.starters and any(one.message == START for one in first.deliveries):
            moves = self.find_moves(first)
            first = next(move.state for move in moves if move.delivery.message == START)
        self.first = first

    def walk(self, deadline):
        """Visit all states; how many there are, and whether that was all. Exits at a wrong end."""
        seen, path = {self.first}, [Move(None, 'it begins', None, self.first)]
        untried = [self.find_moves(self.first)]
        while path:
            move = next(untried[-1], None)
            if move is None:
                untried.pop()
                path.pop()
            elif move.state not in seen:
                seen.add(move.state)
                path.append(move)
                moves = list(self.find_moves(move.state))
                problem = '' if moves else self.find_problem(move.state)
                if problem:
                    sys.exit('\n'.join([self.scenario.name, *tell(path), f'WRONG: {problem}']))
                untried.append(iter(moves))
                if time.monotonic() > deadline:
                    return len(seen), False
        return len(seen), True

    def deliver(self, message):
        if message not in self.messages:
            self.messages[message] = Delivery(self.scenario, message)
        return self.messages[message]

    def find_moves(self, state):
        awake = [one for one in state.deliveries if one.step[0] != 'waits']
        # What concerns nobody else needs no other order.
        alone = [one for one in awake if one.step[0] in ('draws a nonce', 'ends')]
        for one in dict.fromkeys(alone[:1] or state.deliveries):
            yield from self.find_moves_of(one, state)
        # A pause outlasts all that has begun, and the body. A part may be delivered later.
        if len(awake) < len(state.deliveries) and not alone:
            if not any(one.answers or one.message[0] == 'body' for one in awake):
                woken = [one if one in awake else one.after('woken') for one in state.deliveries]
                yield self.move(None, 'all that wait go on', None, state, woken)

    def find_moves_of(self, one, state):
        kind, *details = one.step
        others = list(state.deliveries)
        others.remove(one)
        if kind == 'ends':
            yield self.move(one, 'done', None, state, others)
        elif kind == 'draws a nonce':
            then = one.after(f'nonce {state.nonces + 1}')
            changes = {'nonces': state.nonces + 1}
            yield self.move(one, then.answers[-1], then, state, [*others, then], **changes)
        elif kind == 'sends':
            name, args, message = details
            is_part = name == 'part'
            copies = self.scenario.parts.count(message[0]) if is_part else name == 'body'
            if name == 'body' and self.scenario.silent:
                copies = 0
            new = [self.deliver(message) for number in range(copies)]
            then = one.after('sent')
            sent = state.sent if is_part else (*state.sent, name + args)
            yield self.move(one, 'done', then, state, [*others, then, *new], sent=sent)
        elif kind in ('GET', 'PUT', 'DELETE'):
            objects = dict(state.objects)
            answer, objects = answer_as_s3(objects, *one.step)
            changes = {'objects': frozenset(objects.items())}
            if one.message == START and kind == 'PUT' and answer == b'' and state.sent:
                is_new = 'unlock' in details[0] and len(objects) > len(state.objects)
                changes.update(stays=True, more=state.more + is_new)
            then = one.after(answer)
            yield self.move(one, answer, then, state, [*others, then], **changes)
            if state.lost and kind != 'GET' and answer == b'':
                then = one.after(LOST)
                changes['lost'] = state.lost - 1
                yield self.move(one, LOST, then, state, [*others, then], **changes)
        if state.deaths and one.answers and kind not in ('GET', 'draws a nonce', 'raises'):
            keys = [key for key, value in state.objects]
            more, stays = state.more, state.stays
            if one.has_sent:
                stays = True
                is_record = any('taskset' in key for key in keys)
                is_unseen = self.scenario.silent or self.scenario.failing
                more += bool(is_record and is_unseen and 'celery-task-meta-body' not in keys)
            again = self.deliver(one.message)
            changes = {'deaths': state.deaths - 1, 'more': more, 'stays': stays}
            yield self.move(one, 'DIES', again, state, [*others, again], **changes)

    def move(self, one, happening, then, state, deliveries, **changes):
        ordered = tuple(sorted(deliveries, key=lambda each: each.number))
        return Move(one, happening, then, state._replace(deliveries=ordered, **changes))

    def find_problem(self, state):
        """What is wrong with this end."""
        if state.deliveries:
            return state.deliveries[0].step
        scenario, objects = self.scenario, dict(state.objects)
        right = {part: f'"result of {part}"' for part in sorted(set(scenario.parts))}
        call = f'body({[text[1:-1] for text in right.values()]},)'
        if not scenario.silent:
            right['body'] = '"result of body"'
        if scenario.failing:
            right[scenario.failing] = right['body'] = 'boom'
            call = "errback('body',)"
        if not 1 <= len(state.sent) <= 1 + state.more or set(state.sent) != {call}:
            return f'sent {state.sent}, not {call} once'
        for task_id in right:
            value = objects.pop(f'celery-task-meta-{task_id}', b'').decode()
            if right[task_id] not in value:
                return f'the result of {task_id} is {value}'
        return '' if state.stays or not objects else f'left in the bucket: {objects}'


def tell(path):
    """Who took which step, and what happened to it, a line each."""
    names, known = [], []  # of the deliveries that have not ended
    for move in path:
        if move.delivery:
            place = known.index(move.delivery)
            step = [brief(part) for part in move.delivery.step[:4] if part]
            yield f'{names[place]}: {" ".join(step)} -> {brief(move.happening)}'
            names[place] += ', again' if move.happening == 'DIES' else ''
            known[place] = move.then
        else:
            yield f'({move.happening})'
            known = [one.after('woken') if one and one.step[0] == 'waits' else one for one in known]
        new = list(move.state.deliveries)
        for one in known:
            if one in new:
                new.remove(one)
        known += new
        for one in new:
            task_id = one.message[0]
            earlier = sum(name.startswith(task_id) for name in names)
            names.append(f'{task_id}{earlier + 1}')


def brief(part):
    text = part.decode() if isinstance(part, bytes) else str(part)
    if '"status"' in text:
        meta = json.loads(text)
        text = f'{meta["status"]}, {meta["result"]}'
    return text or 'done'


APP = App(broker='memory://', set_as_current=False)
celery_s3.logger.disabled = True
celery_s3.Bucket._send_once, celery_s3.Bucket = send_once, lambda: deepcopy(BUCKET)
celery_s3.uuid = lambda: Delivery.running.ask('draws a nonce')
celery_s3.time = SimpleNamespace(sleep=lambda seconds: seconds and Delivery.running.ask('waits'))
searches = [(scenario, order) for scenario in SCENARIOS for order in ORDERS]
deadline = time.monotonic() + float(sys.argv[2] if sys.argv[1:2] == ['--seconds'] else 300)
have_ended = True
for number, (scenario, order) in enumerate(searches):
    celery_s3.random = SimpleNamespace(shuffle=ORDERS[order], uniform=lambda least, most: 0)
    began = time.monotonic()
    search = Search(scenario)
    states, has_ended = search.walk(began + (deadline - began) / (len(searches) - number))
    end = 'all' if has_ended else 'NOT ALL, time is up'
    took = time.monotonic() - began
    print(f'{scenario.name:45} {order:9} {states:7} states {Delivery.count:5} runs {took:5.1f} s {end}', flush=True)
    have_ended = have_ended and has_ended
sys.exit(not have_ended)
