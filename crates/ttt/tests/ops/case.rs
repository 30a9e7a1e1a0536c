//! What the tests of operations share.

use ttt::device::view::View;
use ttt::device::{Device, Kernels};
use ttt::tensor::{DType, Tensor};

type Forward = Box<dyn Fn(&[View]) -> Vec<Tensor> + Sync>;
type Backward = Box<dyn Fn(&[View], &[Tensor]) -> Vec<Tensor> + Sync>;

/// One operation at one size: its inputs, its outputs, and the gradient of each input from the gradients of the outputs.
pub struct Case {
    name: &'static str,
    inputs: Vec<(&'static str, Vec<usize>)>,
    scales: Vec<f64>,
    /// Inputs that are f32 in mixed precision too.
    in_f32: Vec<usize>,
    forward: Forward,
    backward: Backward,
}

/// A device that runs references.
pub fn reference() -> Device {
    Device::cpu_with(1, Kernels::Reference).unwrap()
}

/// A device that runs fast kernels.
pub fn fast(threads: usize) -> Device {
    Device::cpu_with(threads, Kernels::Fast).unwrap()
}

/// f32 values between -1 and 1, another series for each seed.
pub fn filled(device: &Device, shape: &[usize], seed: usize) -> Tensor {
    let data: Vec<f32> = (0..shape.iter().product()).map(|i| value(i, seed) as f32).collect();
    Tensor::from_slice(device, shape, &data).unwrap()
}

fn value(i: usize, seed: usize) -> f64 {
    let x = (12.9898 * (i + 1) as f64 + 78.233 * seed as f64).sin() * 43758.5453;
    2.0 * (x - x.floor()) - 1.0
}

/// A tensor of given numbers, made on the CPU.
pub fn placed(device: &Device, shape: &[usize], data: &[f64], dtype: DType) -> Tensor {
    let made = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let tensor = Tensor::from_slice(&device.cpu_beside(), shape, data).unwrap().cast(made).unwrap().to(device).unwrap();
    if dtype == made { tensor } else { tensor.cast(dtype).unwrap() }
}

/// A copy of what a view shows.
pub fn tensor_of(view: View) -> Tensor {
    let mut copy = Tensor::empty(view.device(), &view.shape(), view.dtype()).unwrap();
    ttt::ops::add::copy_to(copy.view_mut(), view);
    copy
}

/// What `add` adds to a gradient of the shape of `like` that is not zero before. Gradients of bf16 operands are f32.
pub fn added(like: View, add: impl FnOnce(&mut Tensor)) -> Tensor {
    let shape = like.shape();
    let dtype = if like.dtype() == DType::Bf16 { DType::F32 } else { like.dtype() };
    let mut d = placed(like.device(), &shape, &vec![0.5; shape[0] * shape[1]], dtype);
    add(&mut d);
    let data: Vec<f64> = d.to_f64_vec().iter().map(|x| x - 0.5).collect();
    placed(like.device(), &shape, &data, dtype)
}

/// Panics when an element is further from the wanted one than `ratio` of the largest.
pub fn expect_close(name: &str, is: &[f64], want: &[f64], ratio: f64) {
    assert_eq!(is.len(), want.len(), "{name}: number of elements");
    let scale = want.iter().fold(0f64, |a, x| a.max(x.abs())).max(1e-30);
    for (i, (is, want)) in is.iter().zip(want).enumerate() {
        let error = (is - want).abs() / scale;
        assert!(error <= ratio, "{name}[{i}]: {is} and not {want}: {error:e} of the largest, {ratio:e} allowed");
    }
}

impl Case {
    pub fn new(name: &'static str, inputs: &[(&'static str, &[usize])]) -> Case {
        let inputs: Vec<_> = inputs.iter().map(|(name, shape)| (*name, shape.to_vec())).collect();
        let scales = vec![1.5; inputs.len()];
        Case { name, inputs, scales, in_f32: Vec::new(), forward: Box::new(|_| Vec::new()), backward: Box::new(|_, _| Vec::new()) }
    }

    /// Inputs that are f32 in mixed precision too.
    pub fn in_f32(mut self, inputs: &[usize]) -> Case {
        self.in_f32 = inputs.to_vec();
        self
    }

    /// The values of input `n` lie between -scale and scale (1.5 otherwise).
    pub fn scaled(mut self, n: usize, scale: f64) -> Case {
        self.scales[n] = scale;
        self
    }

    /// Whether it is of this operation.
    pub fn is(&self, name: &str) -> bool {
        self.name == name
    }

    pub fn forward(mut self, f: impl Fn(&[View]) -> Vec<Tensor> + Sync + 'static) -> Case {
        self.forward = Box::new(f);
        self
    }

    pub fn backward(mut self, f: impl Fn(&[View], &[Tensor]) -> Vec<Tensor> + Sync + 'static) -> Case {
        self.backward = Box::new(f);
        self
    }

    fn inputs(&self) -> Vec<Vec<f64>> {
        let fill = |(seed, (_, shape)): (usize, &(_, Vec<usize>))| {
            (0..shape.iter().product()).map(|i| (self.scales[seed] * value(i, seed)) as f32 as f64).collect()
        };
        self.inputs.iter().enumerate().map(fill).collect()
    }

    /// Runs `work` with the inputs as views; strided: as column blocks of wider matrices that are NaN elsewhere.
    fn with<T: Send>(
        &self,
        device: &Device,
        dtype: DType,
        inputs: &[Vec<f64>],
        strided: bool,
        work: impl Fn(&[View]) -> T + Sync,
    ) -> T {
        let (before, after) = if strided { (3, 2) } else { (0, 0) };
        let tensor = |((n, (_, shape)), data): ((usize, &(_, Vec<usize>)), &Vec<f64>)| {
            let width = before + shape[1] + after;
            let mut wide = vec![f64::NAN; shape[0] * width];
            for i in 0..shape[0] {
                wide[i * width + before..][..shape[1]].copy_from_slice(&data[i * shape[1]..][..shape[1]]);
            }
            let dtype = if dtype == DType::Bf16 && self.in_f32.contains(&n) { DType::F32 } else { dtype };
            placed(device, &[shape[0], width], &wide, dtype)
        };
        let tensors: Vec<Tensor> = self.inputs.iter().enumerate().zip(inputs).map(tensor).collect();
        device.install(|| {
            let block = |(tensor, (_, shape)): (_, &(_, Vec<usize>))| Tensor::view(tensor).col_range(before..before + shape[1]);
            let views: Vec<View> = tensors.iter().zip(&self.inputs).map(block).collect();
            work(&views)
        })
    }

    /// Outputs, and the gradients of the inputs of Σ outputs · fixed weights.
    fn run(&self, device: &Device, dtype: DType, inputs: &[Vec<f64>], strided: bool) -> (Vec<Tensor>, Vec<Tensor>) {
        self.with(device, dtype, inputs, strided, |views| {
            let outputs = (self.forward)(views);
            let dy: Vec<Tensor> = outputs.iter().enumerate().map(|(i, y)| weights(y, i)).collect();
            let gradients = (self.backward)(views, &dy);
            assert_eq!(gradients.len(), self.inputs.len(), "{}: a gradient for each input", self.name);
            (outputs, gradients)
        })
    }

    fn loss(&self, device: &Device, inputs: &[Vec<f64>]) -> f64 {
        let outputs = self.with(device, DType::F64, inputs, false, |views| (self.forward)(views));
        let dot =
            |(i, y): (usize, &Tensor)| -> f64 { y.to_f64_vec().iter().zip(weights(y, i).to_f64_vec()).map(|(y, w)| y * w).sum() };
        outputs.iter().enumerate().map(dot).sum()
    }

    /// Every entry of every gradient against central differences, in f64.
    pub fn check_finite_differences(&self, strided: bool) {
        let device = reference();
        let mut inputs = self.inputs();
        let (_, gradients) = self.run(&device, DType::F64, &inputs, strided);
        for (n, (name, _)) in self.inputs.iter().enumerate() {
            let step = 1e-5;
            let mut want = Vec::new();
            for i in 0..inputs[n].len() {
                let at = inputs[n][i];
                let mut loss = |x| {
                    inputs[n][i] = x;
                    self.loss(&device, &inputs)
                };
                want.push((loss(at + step) - loss(at - step)) / (2.0 * step));
                inputs[n][i] = at;
            }
            expect_close(&format!("{}: d{name} (strided: {strided})", self.name), &gradients[n].to_f64_vec(), &want, 1e-6);
        }
    }

    /// Fast f32 against the reference in f64, in outputs and gradients.
    pub fn check_fast(&self, strided: bool) {
        let inputs = self.inputs();
        let is = self.run(&fast(2), DType::F32, &inputs, strided);
        let want = self.run(&reference(), DType::F64, &inputs, false);
        let close = |name: String, is: &Tensor, want: &Tensor| {
            assert_eq!(is.shape(), want.shape(), "{name}");
            let name = format!("{} {:?}: {name} (strided: {strided})", self.name, self.inputs);
            expect_close(&name, &is.to_f64_vec(), &want.to_f64_vec(), 3e-6);
        };
        for (i, (is, want)) in is.0.iter().zip(&want.0).enumerate() {
            close(format!("output {i}"), is, want);
        }
        for ((is, want), (name, _)) in is.1.iter().zip(&want.1).zip(&self.inputs) {
            close(format!("d{name}"), is, want);
        }
    }

    /// A GPU against the reference in f64: outputs and gradients within `ratio` of the largest, and the same bits when run again.
    pub fn check_gpu(&self, device: &Device, dtype: DType, strided: bool, ratio: f64) {
        let mut inputs = self.inputs();
        if dtype == DType::Bf16 {
            for (_, input) in inputs.iter_mut().enumerate().filter(|(n, _)| !self.in_f32.contains(n)) {
                input.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x as f32).to_f64());
            }
        }
        let is = self.run(device, dtype, &inputs, strided);
        let want = self.run(&reference(), DType::F64, &inputs, false);
        let again = self.run(device, dtype, &inputs, strided);
        let named = |i: usize| if i < is.0.len() { format!("output {i}") } else { format!("d{}", self.inputs[i - is.0.len()].0) };
        let all = is.0.iter().chain(&is.1).zip(want.0.iter().chain(&want.1)).zip(again.0.iter().chain(&again.1));
        for (i, ((is, want), again)) in all.enumerate() {
            let name = format!("{} {:?} {dtype:?}: {} (strided: {strided})", self.name, self.inputs, named(i));
            assert_eq!(is.shape(), want.shape(), "{name}");
            let (is, again) = (is.to_f64_vec(), again.to_f64_vec());
            expect_close(&name, &is, &want.to_f64_vec(), ratio);
            assert!(is.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: another result when run again");
        }
    }

    /// The same bits on one thread and on two.
    pub fn check_threads(&self) {
        let inputs = self.inputs();
        let one = self.run(&fast(1), DType::F32, &inputs, false);
        let two = self.run(&fast(2), DType::F32, &inputs, false);
        for (a, b) in one.0.iter().chain(&one.1).zip(two.0.iter().chain(&two.1)) {
            let bits = |t: &Tensor| t.as_slice::<f32>().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(a) == bits(b), "{} {:?}: another result on two threads", self.name, self.inputs);
        }
    }
}

fn weights(y: &Tensor, output: usize) -> Tensor {
    let data: Vec<f64> = (0..y.len()).map(|i| value(i, 91 + output) as f32 as f64).collect();
    placed(y.device(), y.shape(), &data, y.dtype())
}
