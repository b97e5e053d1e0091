// Checks this artefact: runs the golden images by Core ML and compares with what PyTorch said of them.
//
//     swiftc -O -parse-as-library Selftest.swift -o /tmp/selftest      # macOS 14 or later
//     /tmp/selftest FOLDER                                             # the artefact's
//
// In an app or its tests, with the folder among the resources: `try await check(folder)`. Prints a line per output and
// PASS or FAIL; exit code 0, or 1 where it fails.
//
// NOT RUN where it was written: there was no Mac. Its syntax was checked, Core ML never saw it.

import CoreML
import CoreVideo
import Foundation

// An output of the network: its file in golden/, what an error on each image is divided by, the largest rel.
struct Golden {
    let name: String
    let file: String
    let spreads: [Double]
    let limit: Double
}

// <facts>
let modelFile = "model.mlpackage"
let inputName = "image"
let takesPixels = false
let batch = 1
let mean: [Float] = [0.5, 0.5, 0.5]
let std: [Float] = [0.5, 0.5, 0.5]
let goldenOutputs = [
    Golden(name: "logits", file: "logits.npy", spreads: [1.0], limit: 1e-4)
]
// </facts>

struct SelftestError: Error, CustomStringConvertible {
    let description: String
}

/// A C-contiguous .npy file: magic, version, length of the header, header (a Python dict), values.
struct Npy {
    let shape: [Int]
    let bytes: Data

    init(_ url: URL, dtype: String) throws {
        let file = [UInt8](try Data(contentsOf: url))
        guard file.count >= 12, Array(file[1..<6]) == Array("NUMPY".utf8) else {
            throw SelftestError(description: "\(url.lastPathComponent) is no .npy file")
        }
        let start = file[6] == 1 ? 10 : 12
        var length = Int(file[8]) | Int(file[9]) << 8
        if start == 12 {
            length |= Int(file[10]) << 16 | Int(file[11]) << 24
        }
        guard start + length <= file.count else {
            throw SelftestError(description: "\(url.lastPathComponent) is cut short")
        }
        let header = String(decoding: file[start..<(start + length)], as: UTF8.self)
        guard header.contains("'\(dtype)'"), header.contains("'fortran_order': False"),
            let shapeStart = header.range(of: "'shape': (")?.upperBound,
            let shapeEnd = header[shapeStart...].firstIndex(of: ")")
        else {
            throw SelftestError(description: "\(url.lastPathComponent) does not hold \(dtype) in C order")
        }
        shape = header[shapeStart..<shapeEnd].split(separator: ",").compactMap { part in
            Int(part.trimmingCharacters(in: .whitespaces))
        }
        bytes = Data(file[(start + length)...])
        let size = dtype == "<f4" ? 4 : 1
        guard !shape.isEmpty, !bytes.isEmpty, bytes.count == size * shape.reduce(1, *) else {
            throw SelftestError(description: "\(url.lastPathComponent) is cut short")
        }
    }

    var floats: [Float] {
        bytes.withUnsafeBytes { raw in
            (0..<(raw.count / 4)).map { index in
                Float(bitPattern: UInt32(littleEndian: raw.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self)))
            }
        }
    }
}

/// (H, W, C) pixels -> (C, H, W), every operation in Float.
func normalised(_ pixels: [UInt8], channels: Int) -> [Float] {
    let plane = pixels.count / channels
    var result = [Float](repeating: 0, count: pixels.count)
    for pixel in 0..<plane {
        for channel in 0..<channels {
            let scaled = Float(pixels[pixel * channels + channel]) / 255
            result[channel * plane + pixel] = (scaled - mean[channel]) / std[channel]
        }
    }
    return result
}

/// One image of (H, W, C) pixels as Core ML takes pictures.
func pixelBuffer(_ pixels: [UInt8], height: Int, width: Int, channels: Int) throws -> CVPixelBuffer {
    let format = channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
    var made: CVPixelBuffer?
    let status = CVPixelBufferCreate(kCFAllocatorDefault, width, height, format, nil, &made)
    guard status == kCVReturnSuccess, let buffer = made else {
        throw SelftestError(description: "no pixel buffer: error \(status)")
    }
    CVPixelBufferLockBaseAddress(buffer, [])
    defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
    guard let base = CVPixelBufferGetBaseAddress(buffer) else {
        throw SelftestError(description: "the pixel buffer has no memory")
    }
    let rowBytes = CVPixelBufferGetBytesPerRow(buffer)
    for row in 0..<height {
        let line = base.advanced(by: row * rowBytes).assumingMemoryBound(to: UInt8.self)
        for column in 0..<width {
            let from = (row * width + column) * channels
            if channels == 1 {
                line[column] = pixels[from]
            } else {
                line[4 * column] = pixels[from + 2]
                line[4 * column + 1] = pixels[from + 1]
                line[4 * column + 2] = pixels[from]
                line[4 * column + 3] = 255
            }
        }
    }
    return buffer
}

/// What the model takes for these images, each (H, W, C) pixels.
func feature(_ images: [[UInt8]], height: Int, width: Int, channels: Int) throws -> MLFeatureValue {
    if takesPixels {
        return MLFeatureValue(
            pixelBuffer: try pixelBuffer(images[0], height: height, width: width, channels: channels))
    }
    let scalars = images.flatMap { normalised($0, channels: channels) }
    let array = MLShapedArray<Float>(scalars: scalars, shape: [images.count, channels, height, width])
    return MLFeatureValue(multiArray: MLMultiArray(array))
}

/// The golden outputs of all images, by name, one after the other; a batch that is not full is filled up.
func run(_ model: MLModel, _ golden: Npy) throws -> [String: [Float]] {
    let (count, height, width, channels) = (golden.shape[0], golden.shape[1], golden.shape[2], golden.shape[3])
    let size = height * width * channels
    let pixels = [UInt8](golden.bytes)
    let images = (0..<count).map { Array(pixels[($0 * size)..<(($0 + 1) * size)]) }
    var found: [String: [Float]] = [:]
    for start in stride(from: 0, to: count, by: batch) {
        let chunk = (start..<(start + batch)).map { images[min($0, count - 1)] }
        let value = try feature(chunk, height: height, width: width, channels: channels)
        let output = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: [inputName: value]))
        for each in goldenOutputs {
            guard let array = output.featureValue(for: each.name)?.multiArrayValue else {
                throw SelftestError(description: "the model has no output \(each.name)")
            }
            let values = MLShapedArray<Float>(converting: array).scalars
            found[each.name, default: []] += values.prefix(values.count / batch * min(batch, count - start))
        }
    }
    return found
}

/// Prints a line per output; whether all of them are right.
func check(_ folder: URL) async throws -> Bool {
    let goldenFolder = folder.appendingPathComponent("golden")
    let compiled = try await MLModel.compileModel(at: folder.appendingPathComponent(modelFile))
    let model = try MLModel(contentsOf: compiled)
    let images = try Npy(goldenFolder.appendingPathComponent("images.npy"), dtype: "|u1")
    guard images.shape.count == 4, images.shape[3] == mean.count else {
        throw SelftestError(description: "the golden images are not (n, H, W, C)")
    }
    let found = try run(model, images)
    var judged = 0
    var right = true
    for golden in goldenOutputs {
        let expected = try Npy(goldenFolder.appendingPathComponent(golden.file), dtype: "<f4").floats
        let actual = found[golden.name] ?? []
        guard actual.count == expected.count, golden.spreads.count == images.shape[0] else {
            print("\(golden.name): \(actual.count) values, golden \(expected.count)")
            right = false
            continue
        }
        guard let least = golden.spreads.min(), least > 0 else {
            print("\(golden.name): the same for every golden image, not judged")
            continue
        }
        let each = expected.count / golden.spreads.count
        var rel = 0.0
        for index in expected.indices {
            let share = abs(Double(actual[index]) - Double(expected[index])) / golden.spreads[index / each]
            if share.isNaN {
                rel = share
                break
            }
            rel = max(rel, share)
        }
        print("\(golden.name): rel \(rel), limit \(golden.limit)")
        judged += 1
        right = right && rel <= golden.limit
    }
    return right && judged > 0
}

@main
struct Selftest {
    static func main() async {
        let path = CommandLine.arguments.count > 1 ? CommandLine.arguments[1] : ".."
        var right = false
        do {
            right = try await check(URL(fileURLWithPath: path))
        } catch {
            print("\(error)")
        }
        print(right ? "PASS" : "FAIL")
        exit(right ? 0 : 1)
    }
}
