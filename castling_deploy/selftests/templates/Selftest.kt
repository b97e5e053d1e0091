// Checks this artefact on an Android device: runs the golden images by ExecuTorch and compares with what PyTorch said of
// them. Needs implementation("org.pytorch:executorch-android:1.5.+").
//
// In an instrumented test, with the artefact's folder pushed to where the app may read it:
//
//     @Test fun artefact() = Selftest.run(File(context.filesDir, "FOLDER"))
//
// Prints a line per output and PASS; where it fails, prints FAIL and throws an AssertionError.
//
// NOT RUN where it was written: there was no Android device. It was compiled, ExecuTorch for Android never saw it.

package castling.selftest

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

// An output of the network: its file in golden/, what an error on each image is divided by, the largest rel.
private class Golden(val name: String, val file: String, val spreads: DoubleArray, val limit: Double)

// <facts>
private const val MODEL = "model.pte"
private const val BATCH = 1
private val MEAN = floatArrayOf(0.5f, 0.5f, 0.5f)
private val STD = floatArrayOf(0.5f, 0.5f, 0.5f)
private val OUTPUTS = listOf("logits")
private val GOLDEN = listOf(
    Golden("logits", "logits.npy", doubleArrayOf(1.0), 1.0E-4),
)
// </facts>

/** A C-contiguous .npy file: magic, version, length of the header, header (a Python dict), values. */
private class Npy(file: File, dtype: String) {
    val shape: IntArray
    val values: ByteBuffer

    init {
        val bytes = file.readBytes()
        require(bytes.size >= 12 && String(bytes, 1, 5, Charsets.US_ASCII) == "NUMPY") { "$file is no .npy file" }
        val buffer = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
        val start = if (bytes[6].toInt() == 1) 10 else 12
        val length = if (start == 10) buffer.getShort(8).toInt() and 0xFFFF else buffer.getInt(8)
        require(length >= 0 && start + length <= bytes.size) { "$file is cut short" }
        val header = String(bytes, start, length, Charsets.US_ASCII)
        require("'$dtype'" in header && "'fortran_order': False" in header) { "$file does not hold $dtype in C order" }
        val axes = header.substringAfter("'shape': (").substringBefore(")")
        shape = axes.split(",").filter { it.isNotBlank() }.map { it.trim().toInt() }.toIntArray()
        buffer.position(start + length)
        values = buffer.slice().order(ByteOrder.LITTLE_ENDIAN)
        val size = if (dtype == "<f4") 4 else 1
        val count = shape.fold(size) { product, axis -> product * axis }
        require(shape.isNotEmpty() && count > 0 && values.remaining() == count) { "$file is cut short" }
    }

    fun floats(): FloatArray {
        val from = values.asFloatBuffer()
        return FloatArray(from.remaining()).also { from.get(it) }
    }
}

object Selftest {
    /** `folder` is the artefact's. Throws an AssertionError where an output is wrong. */
    fun run(folder: File) {
        val right = check(folder)
        println(if (right) "PASS" else "FAIL")
        if (!right) throw AssertionError("FAIL: ${folder.name} does not compute what it has to")
    }

    /** Prints a line per output; whether all of them are right. */
    fun check(folder: File): Boolean {
        val images = Npy(File(folder, "golden/images.npy"), "|u1")
        require(images.shape.size == 4 && images.shape[3] == MEAN.size) { "the golden images are not (n, H, W, C)" }
        val found = outputs(File(folder, MODEL), images)
        var judged = 0
        var right = true
        for (golden in GOLDEN) {
            val expected = Npy(File(folder, "golden/${golden.file}"), "<f4").floats()
            val actual = found.getValue(golden.name)
            if (actual.size != expected.size || golden.spreads.size != images.shape[0]) {
                println("${golden.name}: ${actual.size} values, golden ${expected.size}")
                right = false
                continue
            }
            if (golden.spreads.any { it <= 0 }) {
                println("${golden.name}: the same for every golden image, not judged")
                continue
            }
            val each = expected.size / golden.spreads.size
            var rel = 0.0
            for (index in expected.indices) {
                val share = abs(actual[index].toDouble() - expected[index]) / golden.spreads[index / each]
                rel = max(rel, share) // NaN stays NaN
            }
            println("${golden.name}: rel $rel, limit ${golden.limit}")
            judged += 1
            right = right && rel <= golden.limit
        }
        return right && judged > 0
    }

    /** The model's outputs of all images, by name, one after the other; a batch that is not full is filled up. */
    private fun outputs(model: File, images: Npy): Map<String, FloatArray> {
        val (count, height, width, channels) = images.shape.toList()
        val each = height * width * channels
        val inputs = normalised(images, count, height * width, channels)
        val shape = longArrayOf(BATCH.toLong(), channels.toLong(), height.toLong(), width.toLong())
        val found = OUTPUTS.associateWith { ArrayList<FloatArray>() }
        val module = Module.load(model.absolutePath)
        try {
            for (start in 0 until count step BATCH) {
                val filled = FloatArray(BATCH * each)
                for (index in 0 until BATCH) {
                    val image = min(start + index, count - 1)
                    inputs.copyInto(filled, index * each, image * each, (image + 1) * each)
                }
                val said = module.forward(EValue.from(Tensor.fromBlob(filled, shape)))
                for ((name, value) in OUTPUTS.zip(said)) {
                    val values = value.toTensor().dataAsFloatArray
                    found.getValue(name) += values.copyOf(values.size / BATCH * min(BATCH, count - start))
                }
            }
        } finally {
            module.destroy()
        }
        return found.mapValues { (_, parts) -> parts.fold(FloatArray(0)) { all, part -> all + part } }
    }

    /** (n, H, W, C) pixels -> (n, C, H, W), every operation in Float. */
    private fun normalised(images: Npy, count: Int, pixels: Int, channels: Int): FloatArray {
        val result = FloatArray(count * pixels * channels)
        for (image in 0 until count) {
            for (pixel in 0 until pixels) {
                for (channel in 0 until channels) {
                    val value = images.values.get((image * pixels + pixel) * channels + channel).toInt() and 0xFF
                    val scaled = value.toFloat() / 255f
                    result[(image * channels + channel) * pixels + pixel] = (scaled - MEAN[channel]) / STD[channel]
                }
            }
        }
        return result
    }
}
