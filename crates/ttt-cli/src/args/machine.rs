//! What the commands are told that are about this machine and this program.

use std::path::PathBuf;

use clap::Subcommand;

use super::DeviceArgs;

/// Arguments of `ttt doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The commands of `ttt kernels`.
#[derive(Debug, Subcommand)]
pub enum Kernels {
    /// Compile all kernels into a folder; set TTT_KERNEL_CUBINS to it where there is no NVRTC
    Build(KernelsBuild),
}

/// Arguments of `ttt kernels build`.
#[derive(Debug, clap::Args)]
pub struct KernelsBuild {
    /// Folder for the machine code and manifest.json
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Architectures: sm_80 is Ampere, sm_89 Ada, sm_90a Hopper
    #[arg(long, value_name = "SM", value_delimiter = ',', default_value = "sm_80,sm_89,sm_90a")]
    pub arch: Vec<String>,
}

/// Arguments of `ttt completions`.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}
