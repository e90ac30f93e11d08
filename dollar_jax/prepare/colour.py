"""HDR and wide-gamut pictures on a BT.709 screen."""

import functools

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
# Linear light of wider primaries to BT.709's (BT.2087; Display P3 likewise from its chromaticities).
TO_BT709 = {
    ColorPrimaries.BT2020: [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ],
    ColorPrimaries.SMPTE432: [[1.224940, -0.224940, 0], [-0.042057, 1.042057, 0], [-0.019638, -0.078636, 1.098274]],
}


@functools.cache
def _linear(transfer: int) -> np.ndarray:
    """Linear light of each code 0 .. 65280, swscale's white in 16 bits; 1 is SDR's white or HDR's reference white."""
    code = np.arange(65281) / 65280
    if transfer == ColorTrc.SMPTE2084:  # BT.2100, table 4; reference white is 203 cd/m² (BT.2408)
        power = code ** (32 / 2523)
        light = np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)
        return (light ** (16384 / 2610) * (10000 / 203)).astype(np.float32)
    if transfer == ColorTrc.ARIB_STD_B67:  # BT.2100, table 5: light of the scene
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    return (code**2.4).astype(np.float32)  # BT.1886


def to_bt709(codes: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """R'G'B' codes uint16 [h, w, 3], white 65280, as uint8 [h, w, 3] for a BT.709 screen (BT.1886). Of HDR, light up to
    0.7 of reference white is kept, and the rest up to 1000 cd/m² bent to end at white."""
    light = _linear(transfer)[np.minimum(codes, 65280)]
    if transfer == ColorTrc.ARIB_STD_B67:  # from scene to display: gamma 1.2 of a screen of 1000 cd/m²
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = light * luminance[..., None] ** 0.2 * (1000 / 203)
    if primaries in TO_BT709:
        light = np.maximum(light @ np.array(TO_BT709[ColorPrimaries(primaries)], np.float32).T, 0)
    if transfer in HDR:
        knee, peak = 0.7, 1000 / 203
        brightest = light.max(-1, keepdims=True)
        over = np.maximum(brightest - knee, 0)
        bent = over / (1 + over * (1 / (1 - knee) - 1 / (peak - knee)))  # slope 1 at the knee, 1 - knee at the peak
        light = light * ((brightest - over + bent) / np.maximum(brightest, 1e-9))
    return np.rint(255 * np.minimum(light, 1) ** (1 / 2.4)).astype(np.uint8)
