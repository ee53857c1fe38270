"""Detection and segmentation with other libraries, wired as the README shows it"""
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from helpers import liven, plain_path, relative_error, run
from hub_server import HubServer
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

pytestmark = pytest.mark.slow


def faster_rcnn(name, **kwargs):
    body = timm.create_model(name, features_only=True, feature_cls='dict', out_indices=(1, 2, 3, 4), **kwargs)
    fpn = FeaturePyramidNetwork(body.feature_info.channels(), 256, extra_blocks=LastLevelMaxPool())
    backbone = nn.Sequential(body, fpn)
    backbone.out_channels = 256
    roi_pool = MultiScaleRoIAlign(['1', '2', '3', '4'], output_size=7, sampling_ratio=2)
    return FasterRCNN(backbone, num_classes=3, box_roi_pool=roi_pool, min_size=128, max_size=160)


def check_gradients(model):
    """Attention of every block learns."""
    gates = {name: p.grad for name, p in model.named_parameters() if '.se.' in name}
    assert len(gates) == 3 * 16
    for name, grad in gates.items():
        assert grad.isfinite().all() and grad.any(), name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('name', ['cbam_resnet50', 'cbam_resnext50_32x4d', 'cbam_resnet50d'])
def test_faster_rcnn(name):
    detector = faster_rcnn(name)
    liven(detector)
    images = [torch.rand(3, 128, 160), torch.rand(3, 120, 110)]
    targets = [
        dict(boxes=torch.tensor([[10., 20., 60., 90.], [50., 50., 110., 100.]]), labels=torch.tensor([1, 2])),
        dict(boxes=torch.tensor([[5., 5., 100., 100.]]), labels=torch.tensor([1]))]
    losses = detector.train()(images, targets)
    assert set(losses) == {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'}
    sum(losses.values()).backward()
    check_gradients(detector)
    with torch.no_grad():
        detections = detector.eval()(images)
    assert [set(d) for d in detections] == [{'boxes', 'labels', 'scores'}] * 2


@torch.no_grad()
def test_faster_rcnn_continues_a_plain_resnet():
    """The detector of the warm start sees what that of the plain ResNet sees."""
    weights = dict(state_dict=liven(timm.create_model('resnet50')).state_dict())
    detectors = [
        faster_rcnn(name, pretrained=True, pretrained_cfg_overlay=weights).eval()
        for name in ('resnet50', 'cbam_resnet50')]
    x = torch.rand(2, 3, 128, 160)
    theirs, ours = (detector.backbone[0](x) for detector in detectors)
    assert list(ours) == ['1', '2', '3', '4'] and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize('arch', ['unet', 'fpn'])
def test_segmentation(arch):
    model = smp.create_model(arch, 'tu-cbam_resnet50', encoder_weights=None, classes=2)
    liven(model)
    x, target = torch.rand(2, 3, 96, 64), torch.randint(2, (2, 96, 64))
    logits = model.train()(x)
    assert logits.shape == (2, 2, 96, 64)
    F.cross_entropy(logits, target).backward()
    check_gradients(model)
    # the decoder reads each stage's map once more, after what runs in place has run
    with torch.no_grad():
        fused = model.double().eval()(x.double())
        with plain_path():
            assert relative_error(fused, model(x.double())) < 1e-10


def test_segmentation_starts_from_timms_weights(tmp_path):
    """`encoder_weights='imagenet'` against a Hub on loopback: the maps of the plain ResNet, bit for bit."""
    theirs, x = liven(timm.create_model('resnet18')), torch.rand(1, 3, 64, 64)
    torch.save(x, tmp_path / 'x.pt')
    with HubServer() as hub:
        hub.repos['timm/resnet18.a1_in1k'] = {'main': {'model.safetensors': hub.store(save(theirs.state_dict()))}}
        run(f'''
            import segmentation_models_pytorch as smp, torch
            encoder = smp.Unet('tu-cbam_resnet18', encoder_weights='imagenet').encoder.eval()
            torch.save(encoder(torch.load({str(tmp_path / 'x.pt')!r})), {str(tmp_path / 'maps.pt')!r})
        ''', **hub.env, HF_HOME=str(tmp_path / 'hf'))
    _, *maps = torch.load(tmp_path / 'maps.pt')
    expected = theirs.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_segmentation_says_that_small_stems_do_not_fit():
    with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
        smp.Unet('tu-cbam_resnet50_s1', encoder_weights=None)
