//! Scales of the scales of one block.

use super::{LEAST_AMAX, nearest_one};

/// ggml's `make_qp_quants`: one scale for numbers that are not below zero, with codes from 0 to `max`: the best of nine divisions, then each
/// code changed alone where that helps, up to five times over. As in C, a negative code wraps around.
pub(in crate::block) fn positive<const N: usize>(numbers: &[f32; N], weights: &[f32; N], max: u8) -> (f32, [u8; N]) {
    let largest = numbers.iter().fold(0f32, |largest, number| if largest > *number { largest } else { *number });
    if largest < LEAST_AMAX {
        return (0.0, [0; N]);
    }
    let most = f32::from(max);
    let held = |number: f32| nearest_one(number).min(i32::from(max));
    let mut by = most / largest;
    let mut best = error(numbers, weights, 1.0 / by, |number| f32::from(nearest_one(by * number) as u8));
    for step in (-4i8..=4).filter(|step| *step != 0) {
        let this_by = (0.1 * f32::from(step) + most) / largest;
        let sum = error(numbers, weights, 1.0 / this_by, |number| held(this_by * number) as f32);
        if sum < best {
            (best, by) = (sum, this_by);
        }
    }
    let (mut xl, mut l2) = (0f32, 0f32);
    let mut codes = [0u8; N];
    for ((code, number), weight) in codes.iter_mut().zip(numbers).zip(weights) {
        let new = held(by * number);
        *code = new as u8;
        xl += weight * number * new as f32;
        l2 += weight * new as f32 * new as f32;
    }
    for _ in 0..5 {
        let mut is_changed = false;
        for ((code, number), weight) in codes.iter_mut().zip(numbers).zip(weights) {
            let old = f32::from(*code);
            let (others_xl, others_l2) = (xl - weight * number * old, l2 - weight * old * old);
            if !(others_xl > 0.0 && others_l2 > 0.0) {
                continue;
            }
            let new = held(number * others_l2 / others_xl);
            if new == i32::from(*code) {
                continue;
            }
            let new_xl = others_xl + weight * number * new as f32;
            let new_l2 = others_l2 + weight * new as f32 * new as f32;
            if new_xl * new_xl * l2 > xl * xl * new_l2 {
                (*code, xl, l2) = (new as u8, new_xl, new_l2);
                is_changed = true;
            }
        }
        if !is_changed {
            break;
        }
    }
    (if l2 > 0.0 { xl / l2 } else { 0.0 }, codes)
}

fn error<const N: usize>(numbers: &[f32; N], weights: &[f32; N], scale: f32, code: impl Fn(f32) -> f32) -> f32 {
    numbers.iter().zip(weights).fold(0f32, |sum, (number, weight)| {
        let off = number - scale * code(*number);
        sum + weight * off * off
    })
}
