import random

from lumi.inference.pages import PAGE_SIZE, Pages, num_pages


def tokens(count, seed=0):
    return random.Random(seed).choices(range(1000), k=count)


def run(pages, prompt, length, **options):
    """Hold pages, compute the prompt, and say so."""
    held = pages.hold(prompt, length, **options)
    pages.publish(held, prompt)
    return held


def test_pages_for_tokens():
    assert [num_pages(count) for count in (0, 1, PAGE_SIZE, PAGE_SIZE + 1)] == [0, 1, 1, 2]


def test_no_page_has_two_holders():
    pages = Pages(8)
    first, second = pages.hold(tokens(20), 40), pages.hold(tokens(20, 1), 40)
    assert len(first.pages) == len(second.pages) == 3
    assert len({*first.pages, *second.pages}) == 6 == pages.num_held
    pages.release(first)
    assert pages.num_held == 3


def test_nothing_changes_where_there_is_no_room():
    pages = Pages(4)
    first = run(pages, tokens(33), 33)
    assert pages.hold([*tokens(33), 1], 80) is None  # shares two pages and would need three more
    assert pages.num_held == 3
    pages.release(first)
    assert pages.num_held == 0
    assert pages.hold(tokens(10, 1), 64).num_shared == 0  # all four are there again


def test_a_known_beginning_is_shared_in_whole_pages():
    pages, prompt = Pages(16), tokens(40)
    first = run(pages, prompt, 48)
    second = run(pages, prompt[:35] + tokens(20, 1), 60)
    assert second.num_shared == 2 * PAGE_SIZE
    assert second.pages[:2] == first.pages[:2]
    assert pages.num_held == len({*first.pages, *second.pages})
    third = pages.hold(tokens(1, 2) + prompt, 48)  # the same tokens one place later
    assert third.num_shared == 0


def test_the_last_token_is_never_shared():
    """Its result chooses the next token."""
    pages, prompt = Pages(16), tokens(2 * PAGE_SIZE)
    run(pages, prompt, 40)
    assert pages.hold(prompt, 40).num_shared == PAGE_SIZE
    assert pages.hold([*prompt, 1], 40).num_shared == 2 * PAGE_SIZE


def test_a_request_may_want_everything_computed():
    pages, prompt = Pages(16), tokens(40)
    first = run(pages, prompt, 40)
    second = run(pages, prompt, 40, may_share=False)
    assert second.num_shared == 0
    assert not set(first.pages) & set(second.pages)


def test_what_is_shared_stays_until_its_last_holder_goes():
    pages, prompt = Pages(6), tokens(33)
    first = run(pages, prompt, 33)
    second = run(pages, prompt, 33)
    pages.release(first)
    assert pages.num_held == 3
    third = pages.hold(tokens(40, 1), 48)
    assert not set(third.pages) & set(second.pages)


def test_answers_are_known_too():
    """The next question of a conversation repeats the answer before it."""
    pages, prompt, answer = Pages(16), tokens(20), tokens(20, 1)
    held = run(pages, prompt, 40)
    pages.publish(held, prompt + answer)
    pages.release(held)
    assert pages.hold(prompt + answer + tokens(5, 2), 64).num_shared == 2 * PAGE_SIZE


def test_the_page_that_was_free_for_longest_makes_room():
    pages = Pages(4)
    for seed in (0, 1):
        pages.release(run(pages, tokens(2 * PAGE_SIZE, seed), 2 * PAGE_SIZE))
    assert pages.num_held == 0
    pages.release(pages.hold(tokens(5, 2), PAGE_SIZE))  # takes one page: the end of the older text
    found = [pages.hold([*tokens(2 * PAGE_SIZE, seed), 1], 33) for seed in (0, 1)]
    assert found[0].num_shared == PAGE_SIZE
    assert found[1] is None  # three pages are held, one is left


def test_random_holders_never_share_what_differs():
    """Ten thousand steps against a plain record of which tokens were written into which page."""
    random.seed(0)
    pages, written, running = Pages(24), {}, []
    beginnings = [tokens(64, seed) for seed in range(3)]
    num_shared = 0
    for _ in range(10_000):
        if running and random.random() < 0.5:
            pages.release(running.pop(random.randrange(len(running))))
            continue
        prompt = random.choice(beginnings)[: random.randrange(1, 64)] + tokens(random.randrange(20), None)
        held = pages.hold(prompt, len(prompt) + random.randrange(1, 40))
        if held is None:
            continue
        num_shared += held.num_shared
        for start in range(0, len(prompt), PAGE_SIZE):
            page = held.pages[start // PAGE_SIZE]
            if start < held.num_shared:
                assert written[page] == prompt[: start + PAGE_SIZE]
            else:
                assert all(page not in other.pages for other in running)
                written[page] = prompt[: start + PAGE_SIZE]
        pages.publish(held, prompt)
        running.append(held)
        assert pages.num_held == len({page for held in running for page in held.pages})
    assert num_shared > 10_000
