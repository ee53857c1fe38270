"""Long runs: memory stays flat, a killed training goes on as if nothing had been, and repeats bit for bit"""
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import run

pytestmark = pytest.mark.slow

# A small network for handwritten digits, its training in steps, and what a process uses.
COMMON = '''
    import gc, os
    import timm, torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images[:1024, None], dtype=torch.float32) / 16 - 0.5
    targets = torch.tensor(digits.target[:1024])

    def create():
        torch.manual_seed(0)
        model = timm.create_model('cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 32, 64, 128))
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(model, optimizer, i, rank=0, world=1):
        x, target = (t.roll(-32 * i, 0)[rank:32:world] for t in (images, targets))
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def used():
        """Resident memory in MB, and tensors."""
        gc.collect()
        with open('/proc/self/statm') as file:
            rss = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
        return rss, sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
'''

INFERENCE = COMMON + '''
    from timm_cbam import attention_maps

    model = create()[0].eval()
    kept = {0}
    def call(i):
        x = images[i % 64:i % 64 + 1 + i % 8]
        with torch.no_grad():
            attention_maps(model, x) if i % 10 == 0 else model(x)
    calls, warmup = 5000, 1000
'''

TRAINING = COMMON + '''
    model, optimizer = create()
    kept = set()
    def call(i):
        if i % 100:
            return step(model, optimizer, i)
        storages = {}
        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            step(model, optimizer, i)
        kept.add(sum(storages.values()))
    calls, warmup = 1000, 200
'''

MEASURE = '''
    for i in range(calls):
        if i == warmup:
            before = used()
        call(i)
    after = used()
    print(after[0] - before[0], after[1] - before[1], len(kept))
'''


@pytest.mark.parametrize('leak', [False, True], ids=['ours', 'with a leak'])
@pytest.mark.parametrize('code', [INFERENCE, TRAINING], ids=['inference', 'training'])
def test_memory_is_flat(code, leak):
    """Resident memory grows by less than 4 MB, no tensor is left, and each step keeps the same bytes for its backward
    pass. A leak of one small map in each call would be seen."""
    if leak:
        code += '''
    leaked, inner = [], call
    def call(i):
        inner(i)
        leaked.append(images[:64].clone())
'''
    growth, tensors, different = map(float, run(code + MEASURE).split())
    assert (growth > 4 and tensors > 500) if leak else (growth < 4 and tensors == 0), (growth, tensors)
    assert different == 1


def test_deterministic_training_repeats():
    code = COMMON + '''
    torch.use_deterministic_algorithms(True)
    import hashlib
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, optimizer = create()
        model.to(memory_format=memory_format)
        for i in range(100):
            step(model, optimizer, i)
        print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest())
'''
    first, second = run(code), run(code)
    assert first == second and len(set(first.splitlines())) == 2


WORKER = COMMON + '''
    import signal, sys
    steps, victim, file, final = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    model, optimizer = create()
    ddp = nn.parallel.DistributedDataParallel(model)
    start = 0
    if os.path.exists(file):
        checkpoint = torch.load(file, weights_only=True)
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        start = checkpoint['step']
        print('resumed at', start, flush=True)
    for i in range(start, steps):
        if i == victim and start == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = step(ddp, optimizer, i, rank, 2)
        if (i + 1) % 50 == 0 and rank == 0:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=i + 1), file + '.new')
            os.replace(file + '.new', file)
    if rank == 0:
        print('loss', loss, flush=True)
        torch.save(model.state_dict(), final)
    torch.distributed.destroy_process_group()
'''


def test_killed_worker_is_resumed(tmp_path):
    """Two processes under torchrun, 500 steps. One is killed at step 230, which ends the other; started again they go
    on at 200, and the weights are bit for bit those of a training that nobody killed."""
    script = tmp_path / 'worker.py'
    script.write_text(textwrap.dedent(WORKER))

    def train(name, victim):
        result = subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script), '500',
             str(victim), str(tmp_path / f'{name}.ckpt'), str(tmp_path / f'{name}.pt')], capture_output=True, text=True)
        return result.returncode, result.stdout, result.stderr

    code, out, error = train('straight', -1)
    assert code == 0 and 'resumed' not in out and float(out.split()[-1]) < 0.1, error
    code, out, error = train('killed', 230)
    assert code == 1 and out == '' and 'exitcode: -9' in error and not (tmp_path / 'killed.pt').exists()
    code, out, error = train('killed', 230)
    assert code == 0 and out.count('resumed at 200') == 2, error
    straight, killed = (torch.load(tmp_path / f'{name}.pt', weights_only=True) for name in ('straight', 'killed'))
    assert all(torch.equal(v, killed[name]) for name, v in straight.items())
