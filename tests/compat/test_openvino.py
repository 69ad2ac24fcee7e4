"""OpenVINO's conversion, of a trace and of a torch.export program."""

import pytest
import timm
import torch

pytestmark = pytest.mark.compat
openvino = pytest.importorskip('openvino')


@pytest.mark.parametrize('exported', [False, True], ids=['trace', 'export'])
@pytest.mark.parametrize(
    'gate', ['', '_se', '_spem', '_saam', '_saam4', '_fa', '_fase', '_cbam', '_sge', '_srm', '_eca']
)
def test_resnet20(gate, exported):
    model = timm.create_model(f'resnet20{gate}').eval()
    x = torch.randn(2, 3, 32, 32)
    if exported:
        converted = openvino.convert_model(torch.export.export(model, (x,)))
    else:
        converted = openvino.convert_model(model, example_input=x)
    run = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    torch.testing.assert_close(torch.from_numpy(run(x.numpy())[0]), model(x), atol=1e-4, rtol=1e-4)
